"""Orbax trees written and read a layer at a time.

A parameter is an uncompressed zarr array, as Orbax makes them without OCDBT, but in Fortran's order
and in chunks that do not cross layers. PyTorch's dense layers are transposed to ours, so that the
bytes of a chunk are those that PyTorch has: nothing is moved in memory. Orbax restores such a tree
like any other.
"""

import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts

METADATA = "_METADATA"
CHUNK_BYTES = 8 << 20
_DICT_KEY = 2  # Orbax's number for a key of a dict

# Weights of training are not rewritten: a folder that a crash of the machine has left is made anew.
_CONTEXT = {"file_io_sync": False}


class Leaf(NamedTuple):
    """The shape and type of a parameter."""

    shape: tuple[int, ...]
    dtype: np.dtype


def _zarr_dtype(dtype: np.dtype) -> str:
    return "bfloat16" if dtype == ml_dtypes.bfloat16 else np.dtype(dtype).str


def chunk_shape(shape: tuple[int, ...], itemsize: int, stacked: bool) -> tuple[int, ...]:
    """The chunks of a parameter: one layer, its last two axes halved until it is small.

    Halves are what meshes split, so that a device reads little beside its share.
    """
    chunk = [1, *shape[1:]] if stacked else list(shape)
    while np.prod(chunk) * itemsize > CHUNK_BYTES:
        even = [axis for axis in range(len(chunk)) if chunk[axis] % 2 == 0]
        if not even:
            break
        axis = max(even, key=lambda axis: chunk[axis])
        chunk[axis] //= 2
    return tuple(chunk)


class TreeWriter:
    """Writes one Orbax tree.

    Args:
      folder: made; Orbax restores from it once `finish` has been called.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self._context = ts.Context(_CONTEXT)
        self._stores: dict[tuple[str, ...], ts.TensorStore] = {}

    def create(self, path: tuple[str, ...], leaf: Leaf, *, stacked: bool) -> None:
        """Makes an array without values."""
        metadata = {
            "zarr_format": 2,
            "shape": leaf.shape,
            "chunks": chunk_shape(leaf.shape, leaf.dtype.itemsize, stacked),
            "dtype": _zarr_dtype(leaf.dtype),
            "order": "F" if len(leaf.shape) > 1 else "C",
            "compressor": None,
            "filters": None,
            "fill_value": None,
            "dimension_separator": ".",
        }
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{self.folder / '.'.join(path)}/"},
            "metadata": metadata,
            "create": True,
            "store_data_equal_to_fill_value": True,
        }
        self._stores[path] = ts.open(spec, context=self._context).result()

    def write(self, path: tuple[str, ...], index: int | None, value: np.ndarray) -> None:
        """Writes a layer of a stacked array, or with an index of None the whole."""
        store = self._stores[path]
        (store if index is None else store[index]).write(value).result()

    def finish(self) -> None:
        """Writes what Orbax needs to read the tree."""
        entries = {
            str(path): {
                "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in path],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
            }
            for path in self._stores
        }
        metadata = {
            "tree_metadata": entries,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self.folder / METADATA).write_text(json.dumps(metadata))
