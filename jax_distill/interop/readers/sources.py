"""The sources that `port` can read, told apart by their files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_distill.interop import diffusers_folder, flux_config
from jax_distill.interop.keys.table import KeyTable
from jax_distill.interop.keys.transformer import TRANSFORMER_KEYS
from jax_distill.interop.parts import Part
from jax_distill.interop.readers import (
    float8,
    safetensors_files,
    single_file,
    torch_files,
    unreadable,
    variants,
)
from jax_distill.storage import paths
from jax_distill.storage.files import check_no_partial
from jax_distill.storage.quoting import shown

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HUB_FILES = [
    diffusers_folder.INDEX,
    *(f"{folder}/*.json" for folder in diffusers_folder.SUBFOLDERS.values()),
    *(f"{folder}/*.safetensors" for folder in diffusers_folder.SUBFOLDERS.values()),
    *(
        f"{folder}/{name}"
        for folder in diffusers_folder.TOKENIZERS
        for name in diffusers_folder.TOKENIZER_FILES
    ),
    f"{diffusers_folder.SCHEDULER}/*.json",
]
_SAFETENSORS = (".safetensors", ".sft")
_TORCH = (".pt", ".pth", ".bin", ".ckpt")

# T2I-Distill's sCM students may hold the head of the loss's weight, which only training uses.
_LOSS_HEAD = ("logvar_linear.weight", "logvar_linear.bias")
_STUDENT_KEYS = KeyTable(TRANSFORMER_KEYS.rules, ignored=_LOSS_HEAD)


class Source(NamedTuple):
    """Weights that can be ported.

    Attributes:
      layout: "diffusers", "t2i_distill" or "bfl".
      parts: under their names in `ported_folder.PARTS`; "network" alone, or all.
      folder: of the pipeline that has all parts; None where there is the network alone.
      told: those of `flux_config.OWN_KEYS` that the files themselves say.
      kind: of the files: "pipeline", "transformer" (its folder), "safetensors" or "torch".
      loss_head: whether tensors are there that only sCM's training uses.
      notes: sentences about what was left aside or changed.
    """

    layout: str
    parts: dict[str, Part]
    folder: Path | None = None
    told: Mapping[str, Any] = {}
    kind: str = "pipeline"
    loss_head: bool = False
    notes: tuple[str, ...] = ()


def locate(source: str | Path) -> Path:
    """The path that --source names: a file, a folder, or a repository of the hub, downloaded.

    Raises:
      ValueError: it is none of them, or the hub cannot be reached.
    """
    check_no_partial(source, "--source")
    path = Path(source)
    if path.exists():
        return path
    if paths.is_address(source):
        raise ValueError(f"--source: '{source}' is an address; copy it to a disk and give that")
    if not _HUB_ID.fullmatch(str(source)):
        raise ValueError(f"--source: no file or folder '{source}'")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"--source: no folder '{source}', and to download it from the hub needs"
            " huggingface_hub; pip install 'jax-distill[flux]'"
        ) from None
    try:
        return Path(snapshot_download(str(source), allow_patterns=_HUB_FILES))
    except Exception as error:  # of the hub, of the network, and of HTTP
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"--source: no folder '{source}', and it cannot be had from the hub"
            f" ({type(error).__name__}: {reason}); download it and give the folder"
        ) from None


def read(
    path: Path,
    base: Mapping[str, Any] | None = None,
    *,
    dtype: np.dtype | None = None,
    variant: str = variants.PLAIN,
) -> Source:
    """The parts of a source; headers are read, no tensors.

    Args:
      path: a diffusers folder, of a pipeline or of its transformer; a file of PyTorch or a
        safetensors file with BFL's or diffusers' names, of the transformer or of all parts.
      base: diffusers' config of a network like it, for what a single file does not say.
      dtype: that tensors in float8 become, see `float8.widened`.
      variant: of the weights in folders, see `variants.choose`.

    Raises:
      ValueError: it cannot be read, or is none of these.
    """
    if path.is_dir():
        return _folder(path, dtype, variant)
    if variant:
        raise ValueError(f"--variant: '{path}' is one file, which has none; leave it out")
    return _file(path, base.get("axes_dims_rope") if base else None, dtype)


def _folder(path: Path, dtype: np.dtype | None, variant: str) -> Source:
    if (path / diffusers_folder.INDEX).exists():
        parts, kind = diffusers_folder.parts(path, variant), "pipeline"
    elif (path / "config.json").exists():
        diffusers_folder.check_variant(path, [path], variant)
        parts = {"network": diffusers_folder.transformer(path, variant)}
        kind = "transformer"
    else:
        raise ValueError(
            f"'{path}' is not a diffusers folder: it has neither {diffusers_folder.INDEX} (of a"
            " pipeline) nor config.json (of a transformer)"
        )
    notes = []
    for name, part in parts.items():
        tensors, more = float8.widened(part.where, part.tensors, dtype)
        parts[name] = part._replace(tensors=tensors)
        notes += more
    folder = path if kind == "pipeline" else None
    told = _told(str(path), parts["network"].config)
    return Source("diffusers", parts, folder, told, kind, notes=tuple(notes))


def _file(path: Path, axes: Any, dtype: np.dtype | None) -> Source:
    unreadable.check_file(path)
    told, wrapped = {}, False
    if path.suffix in _SAFETENSORS:
        tensors, kind = safetensors_files.read_file(path), "safetensors"
        told = _told(str(path), safetensors_files.read_metadata(path))
    elif path.suffix in _TORCH:
        tensors, kind = torch_files.read_file(path), "torch"
        wrapped = torch_files.has_key(path)
    else:
        known = ", ".join((*_SAFETENSORS, *_TORCH))
        raise ValueError(f"'{path}' is of an unknown kind; known endings: {known}")
    found = single_file.transformer(str(path), tensors, dtype)
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    config = flux_config.from_shapes(str(path), shapes, axes_dims_rope=axes)
    part = diffusers_folder.transformer_part(str(path), config, found.tensors, _STUDENT_KEYS)
    loss_head = any(name in found.tensors for name in _LOSS_HEAD)
    student = wrapped or loss_head or flux_config.has_interval(found.tensors)
    layout = "t2i_distill" if kind == "torch" and student else found.layout
    notes = tuple(found.notes)
    return Source(layout, {"network": part}, None, told, kind, loss_head, notes)


def _told(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """This program's own keys among those of a config or of a header.

    Raises:
      ValueError: a factor is no number.
    """
    told = {name: values[name] for name in flux_config.OWN_KEYS if name in values}
    for name in told.keys() & flux_config.FACTORS.keys():
        try:
            told[name] = flux_config.factor(name, told[name])
        except ValueError:
            message = f"{name} is {shown(told[name])}, not a number above 0; correct it there"
            raise ValueError(f"'{where}': {message}") from None
    return told
