"""Networks that look at pictures, from a folder: run by ONNX Runtime, or by transformers' PyTorch.

A folder is as they are on the hub: `config.json`, `preprocessor_config.json`, tokenizers; and the
network, as `model.onnx` (or another name, beside them or in `onnx/`), or as transformers' weights.
Nothing is downloaded, and no code of a folder is run.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_distill.storage.files import FileError, check_regular, read_json
from jax_distill.storage.quoting import one_line, shown

Run = Callable[..., dict[str, np.ndarray]]
"""Named arrays in, named arrays out."""

_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def onnx_file(folder: Path, name: str = "model.onnx") -> Path | None:
    """The network's file in ONNX; None where the folder has none."""
    return next((p for p in (folder / name, folder / "onnx" / name) if p.is_file()), None)


def run_onnx(path: Path, given: Sequence[str]) -> Run:
    """A network in ONNX, as a function of those of its inputs that it has.

    Args:
      path: of the file.
      given: names of inputs that the caller gives.

    Raises:
      FileError: it is no such network, or asks for other inputs.
      ValueError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(f"'{path}' needs ONNX Runtime; pip install 'jax-distill[score]'") from None
    check_regular(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=onnxruntime.get_available_providers()
        )
    except Exception as error:  # of ONNX Runtime's own kinds
        raise FileError(
            f"'{path}' is no network that ONNX Runtime reads ({one_line(str(error))[:200]}); export"
            " it again"
        ) from None
    types = {each.name: _TYPES.get(each.type) for each in session.get_inputs()}
    if odd := [name for name in types if name not in given or types[name] is None]:
        raise FileError(
            f"'{path}' asks for {shown(odd[0])}; export it with the inputs {', '.join(given)}, in"
            " float32 and whole numbers"
        )
    outputs = [each.name for each in session.get_outputs()]

    def run(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        taken = {name: np.asarray(inputs[name], types[name]) for name in types}
        try:
            return dict(zip(outputs, session.run(None, taken)))
        except Exception as error:
            raise FileError(
                f"'{path}' failed ({one_line(str(error))[:200]}); export it for pictures of the"
                " size in preprocessor_config.json"
            ) from None

    return run


def torch_network(folder: Path, kind: str) -> Any:
    """A network of transformers, read from a folder.

    Args:
      folder: of it.
      kind: a class of transformers, such as "AutoModelForObjectDetection".

    Raises:
      FileError: the folder holds no such network, or not all of its weights.
      ValueError: PyTorch is not installed.
    """
    try:
        import torch  # noqa: F401 - transformers' message would be a long one
        import transformers
    except ImportError as error:
        raise ValueError(
            f"'{folder}' needs {error.name}; install it, or give the network as ONNX"
        ) from None
    network, read = read_folder(folder, getattr(transformers, kind), output_loading_info=True)
    # transformers would draw these at random, and warn.
    if lacking := [*read["missing_keys"], *read["mismatched_keys"]]:
        raise FileError(
            f"'{folder}' lacks {shown(lacking[0])} of the weights of a {type(network).__name__};"
            " download it again"
        )
    return network.eval()


def run_torch(call: Callable[..., Any], embeds: str = "") -> Run:
    """A network of transformers, or a method of one, as a function of those inputs that it has.

    Args:
      call: takes tensors and returns some by name, or embeddings: alone or pooled.
      embeds: their name.
    """
    import torch

    known = inspect.signature(getattr(call, "forward", call)).parameters

    def run(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        taken = {name: torch.from_numpy(x) for name, x in inputs.items() if name in known}
        with torch.inference_mode():
            found = call(**taken)
        if embeds:
            found = {embeds: found if torch.is_tensor(found) else found.pooler_output}
        return {name: each.numpy() for name, each in found.items() if torch.is_tensor(each)}

    return run


def read_folder(folder: Path, kind: Any, **settings: Any) -> Any:
    """What a class of transformers reads from a folder, offline.

    Raises:
      FileError: it cannot be read.
    """
    try:
        return kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **settings
        )
    except Exception as error:  # of nearly every kind
        raise FileError(
            f"'{folder}' holds no {kind.__name__} ({one_line(str(error))[:200]}); give a folder as"
            " it is on the hub"
        ) from None


def processor(folder: Path) -> Callable[[Sequence[np.ndarray]], Mapping[str, np.ndarray]]:
    """The function that makes pictures (H, W, 3) uint8 the inputs of a folder's network.

    Raises:
      FileError: the folder has none.
      ValueError: transformers is not installed.
    """
    check_folder(folder)
    try:
        from transformers import AutoImageProcessor, logging
    except ImportError:
        raise ValueError(
            f"'{folder}' needs transformers; pip install 'jax-distill[score]'"
        ) from None
    logging.set_verbosity_error()  # of packages that it could use
    process = read_folder(folder, AutoImageProcessor)

    def made(images: Sequence[np.ndarray]) -> Mapping[str, np.ndarray]:
        return dict(process(list(images), return_tensors="np"))

    return made


def check_folder(folder: Path) -> None:
    """Raises FileError where a folder lacks the description of its pictures."""
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise FileError(f"'{folder}' has no {name}; give a folder as it is on the hub")


def digest(folder: Path) -> str:
    """Of the content of a folder's files, those of folders in it but hidden ones too."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{name.as_posix()} {content}\n".encode())
    return whole.hexdigest()


def config_of(folder: Path, kind: Any) -> Any:
    """The folder's `config.json`, as `read_json` checks it."""
    return read_json(folder / "config.json", kind, fix="download it again")
