"""Orbax trees written and read a layer at a time.

A parameter is an uncompressed zarr array, as Orbax makes them without OCDBT, but in Fortran's order
and in chunks that do not cross layers. PyTorch's dense layers are transposed to ours, so that the
bytes of a chunk are those that PyTorch has: nothing is moved in memory. Orbax restores such a tree
like any other.
"""

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import ml_dtypes
import numpy as np
import tensorstore as ts
from flax.traverse_util import flatten_dict

from jax_distill.storage import paths
from jax_distill.storage.files import FileError, read_json, unread
from jax_distill.storage.quoting import one_line, shown

METADATA = "_METADATA"
_KEY = re.compile(r"[\w-][\w .-]*")  # it becomes the name of a folder
CHUNK_BYTES = 8 << 20
_DICT_KEY = 2  # Orbax's number for a key of a dict

# Weights of training are not rewritten: a folder that a crash of the machine has left is made anew.
_CONTEXT = {"file_io_sync": False}


class _Key(TypedDict):
    key: str | int


class _Entry(TypedDict):
    key_metadata: list[_Key]


class _Description(TypedDict):
    """The keys of `METADATA` that are read."""

    tree_metadata: dict[str, _Entry]
    use_ocdbt: bool
    use_zarr3: bool


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
        self._stores[path] = _waited(ts.open(spec, context=self._context))

    def write(self, path: tuple[str, ...], index: int | None, value: np.ndarray) -> None:
        """Writes a layer of a stacked array, or with an index of None the whole."""
        store = self._stores[path]
        _waited((store if index is None else store[index]).write(value))

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


def _waited(future: Any) -> Any:
    """The result of a future; a full disk, for which TensorStore has ValueErrors, is an OSError."""
    try:
        return future.result()
    except ValueError as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


class StoredLeaf:
    """A parameter on disk, or in memory, that is read a layer at a time.

    Attributes:
      shape: of it.
      dtype: of it.
    """

    def __init__(self, array: Any, *, checked: bool = False, where: str = ""):
        """Takes an array, or a store of TensorStore.

        Args:
          array: of either kind.
          checked: whether `checksum` will be asked for.
          where: the folder of a store, for messages.
        """
        self._array, self._checked, self._where = array, checked, where
        self.shape = tuple(array.shape)
        dtype = array.dtype
        self.dtype = np.dtype(getattr(dtype, "numpy_dtype", dtype))
        self._sums: dict[int | None, int] = {}

    def read(self, index: int | None = None) -> np.ndarray:
        """A layer of a stacked parameter, or with an index of None the whole.

        Raises:
          ValueError: it is damaged, or cannot be read for now.
        """
        array = self._array if index is None else self._array[index]
        if isinstance(array, ts.TensorStore):
            try:
                value = array.read(order="F").result()  # whose transpose is as PyTorch has it
            except (IndexError, KeyError, ValueError) as error:  # of TensorStore, as in open_tree
                raise _unreadable(self._where, error) from None
        else:
            value = np.asarray(array)
        if self._checked:
            self._sums[index] = _sum_of_bits(value)
        return value

    def checksum(self) -> int:
        """The sum modulo 2^32 of all bits as whole numbers (see `checkpoint.checksums`).

        What has not been read so far is read for it.
        """
        if not self._sums:
            self.read()
        if None in self._sums:
            return self._sums[None]
        for index in range(self.shape[0]):
            if index not in self._sums:
                self.read(index)
        return sum(self._sums.values()) % 2**32


def _sum_of_bits(value: np.ndarray) -> int:
    flat = value.reshape(-1, order="A").view(f"u{value.dtype.itemsize}")
    return int(flat.sum(dtype=np.uint32))  # which wraps around


def open_tree(
    folder: Path, under: tuple[str, ...] = (), *, checked: bool = False
) -> dict[str, Any]:
    """A tree that Orbax or `TreeWriter` has written; nothing but its description is read.

    Args:
      folder: of the tree.
      under: the part of it that is wanted.
      checked: whether checksums of the leaves will be asked for.

    Returns:
      Nested dicts of `StoredLeaf`.

    Raises:
      ValueError: there is no such tree, or it is damaged.
    """
    folder, tree = paths.absolute(folder), {}
    fix = "make it anew"
    try:
        description = read_json(folder / METADATA, _Description, fix=fix)
        context = ts.Context({})
        for entry in description["tree_metadata"].values():
            path = tuple(str(key["key"]) for key in entry["key_metadata"])
            if strange := [key for key in path if not _KEY.fullmatch(key)]:
                raise FileError(f"'{folder}' has a parameter {shown(strange[0])}; {fix}")
            if path[: len(under)] == under:
                node = tree
                for key in path[len(under) : -1]:
                    node = node.setdefault(key, {})
                spec = _spec(folder, ".".join(path), description)
                store = ts.open(spec, context=context).result()
                _check_chunks(store)
                node[path[-1]] = StoredLeaf(store, checked=checked, where=str(folder))
    except FileNotFoundError:
        raise ValueError(f"'{folder}' is not an Orbax tree: it has no {METADATA}") from None
    except FileError:
        raise
    # TensorStore's own are ValueErrors; a leaf where a table should be has no keys.
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(str(folder), error) from None
    return tree


def _unreadable(where: str, error: Exception) -> ValueError:
    """The error to raise for one of TensorStore: for now, or of damage."""
    reason = one_line(str(error).partition("\n")[0][:200])
    return unread(f"'{where}'", error) or ValueError(f"'{where}' is damaged ({reason})")


def _check_chunks(store: ts.TensorStore) -> None:
    """Raises ValueError when a store would read more for an element than the whole array has."""
    chunk = store.chunk_layout.read_chunk.shape or ()
    if any(length > max(size, 1) for length, size in zip(chunk, store.shape)):
        raise ValueError(f"chunks of shape {chunk} for an array of shape {tuple(store.shape)}")


def check_shapes(where: str, found: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Compares the names and shapes of stored parameters with those that are expected.

    Args:
      where: begins the message.
      found: nested leaves with a `shape`.
      like: likewise, of the network that it should be.

    Raises:
      ValueError: a parameter is missing, not expected or of another shape.
    """
    there, wanted = (
        {"/".join(map(str, path)): tuple(leaf.shape) for path, leaf in flatten_dict(tree).items()}
        for tree in (found, like)
    )
    for name in sorted(there.keys() ^ wanted.keys()):
        kind = "is missing" if name in wanted else "is not expected"
        raise ValueError(
            f"'{where}': parameter '{name}' {kind}; is config.model another network's?"
        )
    for name, shape in wanted.items():
        if there[name] != shape:
            raise ValueError(
                f"'{where}': parameter '{name}' has shape {there[name]} where {shape} is expected"
            )


def _spec(folder: Path, name: str, description: dict[str, Any]) -> dict[str, Any]:
    """TensorStore's specification of a parameter."""
    if description["use_ocdbt"]:
        store = {"driver": "ocdbt", "base": paths.kvstore(folder), "path": f"{name}/"}
    else:
        store = paths.kvstore(folder / name)
    return {
        "driver": "zarr3" if description["use_zarr3"] else "zarr",
        "kvstore": store,
        "open": True,
        "fill_missing_data_reads": False,
    }
