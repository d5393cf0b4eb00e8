"""The fields of one record: msgpack, as flax writes it, read without trusting it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import serialization

RECORD_BYTES = 2**27  # many times FLUX's: up to 4 MiB of caption, and as much of picture
TYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
}
"""The types that arrays may have, by name."""
_MOST_AXES = 3


class Array(NamedTuple):
    """The kind of a field that is an array.

    Attributes:
      shape: of it; None for an axis of any length of at least one.
      type: name of its numbers' type, a key of `TYPES`.
    """

    shape: tuple[int | None, ...]
    type: str

    def fits(self, value: np.ndarray) -> bool:
        """Whether an array is of this shape and type."""
        return (
            value.dtype.name == self.type
            and value.ndim == len(self.shape)
            and all(
                n == wanted or wanted is None and n for n, wanted in zip(value.shape, self.shape)
            )
        )

    def __str__(self) -> str:
        return f"({', '.join('any' if n is None else str(n) for n in self.shape)}) {self.type}"


def pack(fields: Mapping[str, Any]) -> bytes:
    """A record of text, whole numbers, bytes and arrays; the same bytes for the same fields."""
    return serialization.msgpack_serialize(dict(fields))


def unpack(
    content: bytes, kinds: Mapping[str, type | Array], *, check: bool = True
) -> dict[str, Any]:
    """Reads a record that `pack` made and checks its fields.

    Arrays are views of `content`, which may lie at any byte; nothing large is copied.

    Args:
      content: of the record.
      kinds: of every field: str, int, bytes, or an `Array`.
      check: whether numbers are checked to be finite; else the caller does it, see `finite`.

    Raises:
      ValueError: `content` is something else, or some of its numbers are not finite.
    """
    if len(content) > RECORD_BYTES:
        raise ValueError(f"it is longer than {RECORD_BYTES >> 20} MiB")
    fields = _Packed(content).fields(len(kinds))
    if set(fields) != set(kinds):
        raise ValueError(f"it has not the fields {', '.join(sorted(kinds))}")
    for name, value in fields.items():
        _check(name, value, kinds[name])
        if check and isinstance(value, np.ndarray):
            check_finite(name, value)
    return fields


def check_finite(name: str, values: np.ndarray) -> None:
    """Raises ValueError unless all numbers of a field are finite."""
    if not finite(values):
        raise ValueError(f"its field {name} is not finite")


def _check(name: str, value: Any, kind: type | Array) -> None:
    """Raises ValueError unless a field is of its kind."""
    if not isinstance(kind, Array):
        if type(value) is not kind:
            raise ValueError(f"its field {name} is no {kind.__name__}")
    elif not isinstance(value, np.ndarray):
        raise ValueError(f"its field {name} is no array")
    elif not kind.fits(value):
        raise ValueError(f"its field {name} is {Array(value.shape, value.dtype.name)}, not {kind}")


# What of msgpack flax writes: for the first byte of a value its kind, and the bytes of its length,
# or of the number itself. An "ext" is an array.
_HEADS = {
    **{0xC4 + n: ("bin", 1 << n) for n in range(3)},
    **{0xC7 + n: ("ext", 1 << n) for n in range(3)},
    **{0xCC + n: ("int", 1 << n) for n in range(4)},
    **{0xD9 + n: ("str", 1 << n) for n in range(3)},
}


class _Packed:
    """Reads msgpack where it lies: the package of that name copies arrays twice.

    Args:
      content: of a record, or of an array in it.
    """

    def __init__(self, content: bytes | memoryview):
        self._content, self._at = memoryview(content), 0

    def fields(self, count: int) -> dict[str, Any]:
        """A map from text, which is all there is.

        Raises:
          ValueError: there is something else, or more than `count` fields.
        """
        kind, length = self._head()
        if kind != "map" or length > count:
            raise ValueError("it is not a record")
        found = {}
        for _ in range(length):
            name = self._value("str")
            if name in found:
                raise ValueError(f"it has the field {name!r:.80} twice")
            found[name] = self._value("str", "int", "bin", "ext")
        self._end()
        return found

    def array(self) -> np.ndarray:
        """An array as flax writes it: its shape, the name of its type, and its bytes.

        Raises:
          ValueError: there is something else.
        """
        if self._head() != ("array", 3):
            raise ValueError("its array is none")
        kind, axes = self._head()
        if kind != "array" or axes > _MOST_AXES:
            raise ValueError("its array has no shape")
        shape = [self._value("int") for _ in range(axes)]
        name, (kind, length) = self._value("str"), self._head()
        if kind != "bin":
            raise ValueError("its array has no numbers")
        values = self._take(length)
        self._end()
        kind = TYPES.get(name)
        if kind is None:
            raise ValueError(f"its type {name!r:.80} is not one of {', '.join(TYPES)}")
        if not values or math.prod(shape) * kind.itemsize != len(values):
            raise ValueError(f"its shape {shape!r} does not fit {len(values)} bytes")
        return np.frombuffer(values, kind).reshape(shape)

    def _value(self, *kinds: str) -> Any:
        kind, length = self._head()
        if kind not in kinds:
            raise ValueError(f"it is not a record: it has {kind} in the place of {kinds[0]}")
        if kind == "int":
            return length
        if kind == "str":
            return str(self._take(length), "utf-8")
        if kind == "ext" and self._number(1) != 1:
            raise ValueError("its extension is no array")
        content = self._take(length)
        if kind == "ext":
            return _Packed(content).array()
        return bytes(content)

    def _head(self) -> tuple[str, int]:
        """The kind of the next value, and its length; or the number that it is."""
        code = self._take(1)[0]
        if code in _HEADS:
            kind, size = _HEADS[code]
            return kind, self._number(size)
        if 0xD4 <= code <= 0xD8:
            return "ext", 1 << code - 0xD4
        if code >= 0xC0:
            raise ValueError(f"it is not a record: byte {code:#x} begins none of its fields")
        if code >= 0xA0:
            return "str", code - 0xA0
        if code >= 0x90:
            return "array", code - 0x90
        return ("map", code - 0x80) if code >= 0x80 else ("int", code)

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _take(self, count: int) -> memoryview:
        end = self._at + count
        if end > len(self._content):
            raise ValueError("it is cut short")
        part = self._content[self._at : end]
        self._at = end
        return part

    def _end(self) -> None:
        if self._at != len(self._content):
            raise ValueError("something comes after it")


_CHUNK = 2**18  # bytes, which stay in a core's cache


def finite(values: np.ndarray) -> bool:
    """Whether all values are finite, by their bits.

    As whole numbers those of infinity come after all finite ones, and those of NaN after them; as
    unsigned ones those of negative numbers come last, in the same order.

    Args:
      values: of any floating type, one after another in memory, at any byte.
    """
    size = values.itemsize
    positive = np.array(np.inf, values.dtype).view(f"i{size}")
    negative = np.array(-np.inf, values.dtype).view(f"u{size}")
    content = values.reshape(-1).view(np.uint8)
    for start in range(0, len(content), _CHUNK):
        part = content[start : start + _CHUNK]
        if not values.flags.aligned:  # where reading whole numbers is slow
            part = part.copy()
        if part.view(f"i{size}").max() >= positive or part.view(f"u{size}").max() >= negative:
            return False
    return True
