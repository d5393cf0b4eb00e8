"""Tensors on disk under PyTorch's names, read one at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES: Mapping[str, np.dtype] = {  # safetensors' names of the types that weights come in
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


class Tensor(NamedTuple):
    """One tensor; nothing of it is in memory.

    Attributes:
      shape: of it.
      dtype: of it.
      read: `(start, stop)` rows of its first axis, or the whole of it without arguments; a numpy
        array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[..., np.ndarray]


Tensors = dict[str, Tensor]


def safetensors_file(path: Path) -> Tensors:
    """The tensors of one file.

    Raises:
      ValueError: it is missing, cut short, damaged, or has a type that weights do not come in.
    """

    def reader(name: str) -> Callable[..., np.ndarray]:
        def read(start: int | None = None, stop: int | None = None) -> np.ndarray:
            # Opened for each tensor: mapped pages of a whole file would count as memory.
            with safe_open(path, "np", backend="pread") as file:
                if start is None:
                    return file.get_tensor(name)
                return file.get_slice(name)[start:stop]

        return read

    tensors = {}
    try:
        with safe_open(path, "np", backend="pread") as file:
            for name in file.keys():
                piece = file.get_slice(name)
                tensors[name] = Tensor(
                    tuple(piece.get_shape()), _dtype(path, name, piece.get_dtype()), reader(name)
                )
    except FileNotFoundError:
        raise ValueError(f"'{path}' is missing; download the folder again") from None
    except SafetensorError as error:
        raise ValueError(f"'{path}' is cut short or damaged ({error}); download it again") from None
    return tensors


def _dtype(path: Path, name: str, code: str) -> np.dtype:
    if code not in DTYPES:
        raise ValueError(
            f"'{path}': tensor '{name}' is of type {code}; only {', '.join(DTYPES)} can be read"
        )
    return DTYPES[code]


def safetensors_folder(folder: Path, stem: str) -> Tensors:
    """The tensors of `<stem>.safetensors`, or of the shards that its index names.

    Args:
      folder: of one model.
      stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers).

    Raises:
      ValueError: neither is there, or as `safetensors_file`.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        whole = folder / f"{stem}.safetensors"
        if not whole.exists():
            raise ValueError(f"'{folder}' has neither {whole.name} nor {index.name}")
        return safetensors_file(whole)
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"'{index}' is no index of shards ({error!r}); download it again"
        ) from None
    return merged((folder / file, safetensors_file(folder / file)) for file in files)


def merged(parts: Iterable[tuple[Path, Tensors]]) -> Tensors:
    """All tensors of several files; raises ValueError when two have one of the same name."""
    tensors: Tensors = {}
    for path, part in parts:
        if twice := tensors.keys() & part.keys():
            raise ValueError(f"'{path}': tensor '{min(twice)}' is in another shard too")
        tensors |= part
    return tensors


def check_finite(where: str, name: str, array: np.ndarray) -> None:
    """Raises ValueError when an array of one of `DTYPES` has a NaN or an infinity."""
    # The bits of the exponent are all set; on whole numbers this is several times as fast.
    unsigned = array.view(f"u{array.dtype.itemsize}")
    exponent = np.array(np.inf, array.dtype).view(unsigned.dtype)
    flat = unsigned.reshape(-1)
    step = 1 << 18  # what stays in the cache
    for start in range(0, flat.size, step):
        if ((flat[start : start + step] & exponent) == exponent).any():
            raise ValueError(f"{where}: tensor '{name}' holds NaN or infinity; download it again")
