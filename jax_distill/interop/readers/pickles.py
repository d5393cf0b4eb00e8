"""Pickles of state dicts, read by an unpickler that can do nothing else.

The opcodes are those that PyTorch and pickle write for dicts, lists, tuples, numbers, text and what
`torch.save` names; there is none that calls anything but the few functions here, and none that
takes memory for a size that the pickle merely claims: Python's own unpickler keeps its memo in a
dict, where the one in C makes room for the largest index.
"""

import collections
import io
import pickle
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jax_distill.interop.tensors import FLOAT8

STORAGES = {
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
MOST_BYTES = 4 << 20  # of a pickle; that of FLUX's transformer has 0.2 MB
_MOST_AXES = 8  # of a tensor
_BYTES = "UntypedStorage"
_NEW_TYPES = {str(dtype): dtype for dtype in FLOAT8.values()}  # PyTorch's names, and numpy's


class Refused(Exception):
    """A pickle asks for something that is no part of a state dict."""


class Storage(NamedTuple):
    dtype: np.dtype
    key: str
    count: int  # elements


class View(NamedTuple):
    """A tensor: the part of a storage that offset, shape and strides (in elements) mark."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, *unused):
        del unused  # whether it has a gradient, and its hooks
        lists = all(isinstance(x, tuple | list) and len(x) <= _MOST_AXES for x in (shape, strides))
        if not lists or not isinstance(storage, Storage):
            raise Refused("a tensor that is none")
        shape, strides = tuple(shape), tuple(strides)
        if not all(_is_count(n) for n in (offset, *shape, *strides)):
            raise Refused("a tensor that is none")
        return View(storage, offset, shape, strides)


class _RebuildTypedTensor:
    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, gradient, hooks, dtype, *unused):
        del unused  # metadata
        untyped = isinstance(storage, Storage) and storage.dtype == np.uint8
        if not (untyped and type(dtype) is str and dtype in _NEW_TYPES):
            raise Refused("a tensor that is none")
        dtype = _NEW_TYPES[dtype]
        storage = Storage(dtype, storage.key, storage.count // dtype.itemsize)
        return _RebuildTensor()(storage, offset, shape, strides, gradient, hooks)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, view, *unused):
        del unused
        return view


class _OrderedDict:
    __slots__ = ()

    def __call__(self):
        return collections.OrderedDict()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


class _Unpickler(pickle._Unpickler):
    """Knows the names and the opcodes that a state dict needs and no others."""

    _KNOWN = {
        ("collections", "OrderedDict"): _OrderedDict(),
        ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
        ("torch._utils", "_rebuild_tensor_v3"): _RebuildTypedTensor(),
        ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
        ("torch.storage", _BYTES): _BYTES,
        **{("torch", name): name for name in (*STORAGES, *_NEW_TYPES)},
    }
    _CALLED = (_OrderedDict, _RebuildTensor, _RebuildTypedTensor, _RebuildParameter)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise Refused(f"{module}.{name}")
        return self._KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        kind, name, key, _, count = pid
        known = kind == "storage" and type(name) is str and name in (*STORAGES, _BYTES)
        if not (known and type(key) is str and _is_count(count)):
            raise Refused("a storage that is none")
        return Storage(STORAGES.get(name, np.dtype(np.uint8)), key, count)

    def _reduce(self) -> None:
        if not isinstance(self.stack[-2], self._CALLED):
            raise Refused("a call of what is no function")
        self.load_reduce()

    def _build(self) -> None:
        """Attributes, such as the versions of modules, are passed over: nothing is changed."""
        self.stack.pop()
        if not isinstance(self.stack[-1], collections.OrderedDict):
            raise pickle.UnpicklingError("it changes what has no attributes")

    def _set_item(self) -> None:
        self._check_keys([self.stack[-2]])
        self.load_setitem()

    def _set_items(self) -> None:
        self._check_keys(self.stack[::2])  # what lies above the mark
        self.load_setitems()

    def _dict(self) -> None:
        self._check_keys(self.stack[::2])
        self.load_dict()

    def _check_keys(self, keys: list[Any]) -> None:
        """A tuple of tuples of tuples, each twice, takes for ever to be a key."""
        if not all(isinstance(key, str | int | float) for key in keys):
            raise Refused("a key that is neither text nor a number")

    def _refuse(self) -> None:
        raise Refused("an opcode of pickle's that state dicts do not have")

    _OPCODES = (
        *(pickle.PROTO, pickle.FRAME, pickle.MARK, pickle.STOP, pickle.NONE),
        *(pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1),
        *(pickle.BININT2, pickle.LONG1, pickle.FLOAT, pickle.BINFLOAT),
        *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
        *(pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.LIST, pickle.TUPLE),
        *(pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND, pickle.APPENDS),
        *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
        *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
        *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.PERSID, pickle.BINPERSID),
    )
    dispatch = {
        **dict.fromkeys(range(256), _refuse),
        **{opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _OPCODES},
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dict,
    }


def load(content: bytes) -> Any:
    """The objects of a pickle; tensors are `View`s.

    Args:
      content: of at most `MOST_BYTES`.

    Raises:
      Refused: it names, or does, what no state dict needs.
      Exception: of any kind; it is damaged.
    """
    return _Unpickler(io.BytesIO(content)).load()
