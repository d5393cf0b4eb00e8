"""Files of `torch.save`, without PyTorch: state dicts read and written a tensor at a time.

Such a file is a zip archive, not compressed: `data.pkl` holds the objects, in which a tensor is a
call of `torch._utils._rebuild_tensor_v2` on a place in a storage, and `data/<key>` has a storage's
bytes; `_rebuild_tensor_v3` takes types for which there is no storage, such as float8. Unpickling
can run any code; here the objects may be dicts, lists, numbers, text and tensors, and whatever else
the pickle names is refused.

Source: `torch.serialization`, version 3 of the format (PyTorch 1.6 and later).
"""

import collections
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jax_distill.interop import unreadable
from jax_distill.interop.tensors import FLOAT8, Tensor, Tensors

_STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_BYTES = "UntypedStorage"
_NEW_TYPES = {str(dtype): dtype for dtype in FLOAT8.values()}  # PyTorch's names, and numpy's
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_ARCHIVE = "archive"  # the folder in the zip; its name does not matter
_ALIGNMENT = 64  # of storages, for torch.load(mmap=True)


class _Refused(Exception):
    """What the pickle asks for is no tensor."""


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    count: int  # elements


class _View(NamedTuple):
    """A tensor: the part of a storage that offset, shape and strides (in elements) mark."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, *unused):
        del unused  # whether it has a gradient, and its hooks
        shape, strides = tuple(shape), tuple(strides)
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(_is_count(n) for n in numbers):
            raise _Refused("a tensor that is none")
        return _View(storage, offset, shape, strides)


class _RebuildTypedTensor:
    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, gradient, hooks, dtype, *unused):
        del unused  # metadata
        untyped = isinstance(storage, _Storage) and storage.dtype == np.uint8
        if not (untyped and type(dtype) is str and dtype in _NEW_TYPES):
            raise _Refused("a tensor that is none")
        dtype = _NEW_TYPES[dtype]
        storage = _Storage(dtype, storage.key, storage.count // dtype.itemsize)
        return _RebuildTensor()(storage, offset, shape, strides, gradient, hooks)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, view, *unused):
        del unused
        return view


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


class _Unpickler(pickle.Unpickler):
    """Knows the names that a state dict needs and no others.

    A pickle may also change the state of what it names: none of these has one.
    """

    _KNOWN = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
        ("torch._utils", "_rebuild_tensor_v3"): _RebuildTypedTensor(),
        ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
        ("torch.storage", _BYTES): _BYTES,
        **{("torch", name): name for name in (*_STORAGES, *_NEW_TYPES)},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise _Refused(f"{module}.{name}")
        return self._KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, _, count = pid
        known = kind == "storage" and type(name) is str and name in (*_STORAGES, _BYTES)
        if not (known and type(key) is str and _is_count(count)):
            raise _Refused("a storage that is none")
        return _Storage(_STORAGES.get(name, np.dtype(np.uint8)), key, count)


def read_file(path: Path, key: str = "module") -> Tensors:
    """The state dict in a file, the whole of it or under a key.

    Args:
      path: of the file.
      key: of a dict that has the state dict; T2I-Distill's have {"module": state_dict}.

    Raises:
      ValueError: it is cut short, of another format, of another kind than plain weights, or holds
        code or no state dict.
    """
    objects, places = _open(path)
    state = objects.get(key, objects) if isinstance(objects, dict) else None
    if not isinstance(state, dict) or not any(isinstance(x, _View) for x in state.values()):
        raise ValueError(f"'{path}' holds no state dict, neither as it is nor under {key!r}")
    unreadable.check_names(str(path), [name for name in state if isinstance(name, str)])
    tensors = {}
    for name, view in state.items():
        if not (isinstance(name, str) and isinstance(view, _View)):
            raise ValueError(f"'{path}': {name!r} is no tensor; the file is no student's")
        tensors[name] = _tensor(path, name, view, places)
    return tensors


def has_key(path: Path, key: str = "module") -> bool:
    """Whether the state dict of a file that `read_file` can read is under a key."""
    return key in _open(path)[0]


def _open(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The objects in a file, and where in it each storage's bytes are: (offset, count)."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "data.pkl" not in infos:
                raise ValueError(f"'{path}' is a zip archive, but none of torch.save")
            places, size = {}, path.stat().st_size
            with path.open("rb") as file:
                for name, info in infos.items():
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise ValueError(f"'{path}': '{name}' is compressed; save it with PyTorch")
                    # The local header has a length of its own.
                    file.seek(info.header_offset + 26)
                    start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                    if start + info.file_size > size or info.file_size != info.compress_size:
                        raise zipfile.BadZipFile(f"'{name}' is longer than the file")
                    places[name.removeprefix("data/")] = (start, info.file_size)
            if "byteorder" in infos and archive.read(infos["byteorder"]) != b"little":
                raise ValueError(f"'{path}' is big-endian, which cannot be read")
            with archive.open(infos["data.pkl"]) as file:
                return _Unpickler(file).load(), places
    except FileNotFoundError:
        raise ValueError(f"there is no file '{path}'") from None
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"'{path}' is cut short, or no file of torch.save ({error}); download it again"
        ) from None
    except _Refused as error:
        raise ValueError(
            f"'{path}' asks for {error}, which a file of weights does not; it was not run, and"
            " the file cannot be trusted"
        ) from None
    except ValueError:
        raise
    except Exception as error:  # a damaged pickle raises all kinds
        raise ValueError(f"'{path}' is damaged ({error!r}); download it again") from None


def _tensor(path: Path, name: str, view: _View, places: dict[str, tuple[int, int]]) -> Tensor:
    dtype, key, count = view.storage
    start, available = places.get(key, (0, 0))
    empty = 0 in view.shape
    last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.strides))
    if not empty and not (
        len(view.shape) == len(view.strides)
        and last < count
        and count * dtype.itemsize <= available
    ):
        raise ValueError(f"'{path}' is damaged: tensor '{name}' is not in it; download it again")

    def read(first: int | None = None, stop: int | None = None) -> np.ndarray:
        if empty:
            return np.zeros(view.shape, dtype)
        wanted = last + 1 - view.offset
        flat = np.fromfile(path, dtype, wanted, offset=start + view.offset * dtype.itemsize)
        if flat.size != wanted:
            raise ValueError(f"'{path}' was cut short while tensor '{name}' was read")
        steps = [step * dtype.itemsize for step in view.strides]
        array = np.lib.stride_tricks.as_strided(flat, view.shape, steps)
        return array if first is None else array[first:stop]

    return Tensor(view.shape, dtype, read)


def write_file(path: Path, tensors: Tensors, key: str = "module") -> None:
    """Writes {key: state dict} so that `torch.load` reads it, with `weights_only` too.

    Args:
      path: of the file.
      tensors: of the state dict; read one after another.
      key: of the state dict.
    """
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{_ARCHIVE}/data.pkl", _pickled(tensors, key))
        archive.writestr(f"{_ARCHIVE}/byteorder", "little")
        for index, tensor in enumerate(tensors.values()):
            info = zipfile.ZipInfo(f"{_ARCHIVE}/data/{index}")
            info.file_size = tensor.nbytes
            # A field that readers skip moves the bytes to where the alignment wants them.
            header = archive.fp.tell() + 30 + len(info.filename) + 4
            padding = -header % _ALIGNMENT
            info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            with archive.open(info, "w") as file:
                array = np.ascontiguousarray(tensor.read())
                file.write(memoryview(array.reshape(-1).view(np.uint8)))
        archive.writestr(f"{_ARCHIVE}/version", "3\n")


def _pickled(tensors: Tensors, key: str) -> bytes:
    """The pickle of {key: {name: tensor}}, as PyTorch pickles tensors, in protocol 2."""

    def text(value: str) -> bytes:
        data = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(data)) + data

    def number(value: int) -> bytes:
        data = pickle.encode_long(value)
        return pickle.LONG1 + bytes([len(data)]) + data

    def group(*items: bytes) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    def name(module: str, attribute: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

    def tensor(index: int, value: Tensor) -> bytes:
        storage = group(
            text("storage"),
            name("torch", _STORAGE_NAMES[value.dtype]),
            text(str(index)),
            text("cpu"),
            number(math.prod(value.shape)),
        )
        strides = [math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape))]
        return (
            name("torch._utils", "_rebuild_tensor_v2")
            + group(
                storage + pickle.BINPERSID,
                number(0),
                group(*map(number, value.shape)),
                group(*map(number, strides)),
                pickle.NEWFALSE,
                name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
            )
            + pickle.REDUCE
        )

    items = (text(key) + tensor(i, value) for i, (key, value) in enumerate(tensors.items()))
    state = pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
    outer = pickle.EMPTY_DICT + text(key) + state + pickle.SETITEM
    return pickle.PROTO + b"\x02" + outer + pickle.STOP
