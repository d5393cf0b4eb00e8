"""Tensors under PyTorch's names, read one at a time."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jax_distill.storage.files import named

DTYPES: Mapping[str, np.dtype] = {  # safetensors' names of the types that weights come in
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
CHOICES = {"keep": None, "bfloat16": DTYPES["BF16"], "float32": DTYPES["F32"]}
"""The types that weights are ported and exported in."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOAT8: Mapping[str, np.dtype] = {  # likewise; read, and widened by `float8`
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
OTHER_DTYPES: Mapping[str, np.dtype] = {  # likewise; in files, but not of weights
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
THREADS = 4  # that read and write; a tensor of each is in memory


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

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = dict[str, Tensor]


def read_numbers(path: Path, dtype: np.dtype, count: int, begin: int, name: str) -> np.ndarray:
    """Numbers that lie in a row in a file.

    Args:
      path: of the file.
      dtype: of the numbers.
      count: of them.
      begin: the first one's place, in bytes.
      name: of the tensor, for the message.

    Returns:
      (count,) of `dtype`.

    Raises:
      ValueError: the file is shorter, or cannot be read, which numpy's reader takes for its end.
    """
    flat = np.empty(count, dtype)
    with named(path), path.open("rb") as file:
        file.seek(begin)
        if file.readinto(flat.view(np.uint8)) != flat.nbytes:
            raise ValueError(f"'{path}' was cut short while tensor '{name}' was read")
    return flat


def merged(parts: Iterable[tuple[Path, Tensors]]) -> Tensors:
    """All tensors of several files; raises ValueError when two have one of the same name."""
    tensors: Tensors = {}
    for path, part in parts:
        if twice := tensors.keys() & part.keys():
            raise ValueError(f"'{path}': tensor '{min(twice)}' is in another shard too")
        tensors |= part
    return tensors


def check_types(where: str, tensors: Tensors) -> None:
    """Raises ValueError when a tensor is of none of `DTYPES`."""
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise ValueError(
                f"{where}: tensor '{name}' is of type {tensor.dtype}; only"
                f" {', '.join(map(str, CODES))} can be read"
            )


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
