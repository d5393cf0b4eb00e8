"""The fields of one record: msgpack, as flax writes it, read without trusting it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import msgspec
import numpy as np
from flax import serialization

RECORD_BYTES = 2**27  # many times FLUX's: up to 4 MiB of caption, and as much of picture
TYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
}
"""The types that arrays may have, by name."""


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
        if value.dtype != TYPES[self.type]:
            return False
        return value.shape == self.shape or (
            value.ndim == len(self.shape)
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
      kinds: of every field, fifteen at most: str, int, bytes, or an `Array`.
      check: whether numbers are checked to be finite; else the caller does it, see `finite`.

    Raises:
      ValueError: `content` is something else, or some of its numbers are not finite.
    """
    if content[:1] != bytes([_MAP + len(kinds)]):  # which fields that come twice do not add up to
        raise ValueError(f"it is not a record of {len(kinds)} fields")
    fields = parse(content)
    if fields.keys() != kinds.keys():
        raise ValueError(f"it has not the fields {', '.join(sorted(kinds))}")
    for name, value in fields.items():
        _check(name, value, kinds[name])
        if check and isinstance(value, np.ndarray):
            check_finite(name, value)
    return fields


def parse(content: bytes) -> dict[str, Any]:
    """The fields of a record, whichever they are; raises ValueError where it is none."""
    if len(content) > RECORD_BYTES:
        raise ValueError(f"it is longer than {RECORD_BYTES >> 20} MiB")
    try:
        return _RECORD.decode(content)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"it is not a record: {error}") from None


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


_MAP, _ARRAY_CODE = 0x80, 1
"""The first byte of a map, less its length; and the kind of extension that flax has for arrays."""
_PARTS = msgspec.msgpack.Decoder(tuple[tuple[int, ...], str, memoryview])


def _array(code: int, content: memoryview) -> np.ndarray:
    """An array as flax writes it: its shape, the name of its type, and its bytes."""
    if code != _ARRAY_CODE:
        raise ValueError("its extension is no array")
    shape, name, values = _PARTS.decode(content)
    kind = TYPES.get(name)
    if kind is None:
        raise ValueError(f"its type {name!r:.80} is not one of {', '.join(TYPES)}")
    if not values or min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != len(values):
        raise ValueError(f"its shape {shape!r} does not fit {len(values)} bytes")
    return np.frombuffer(values, kind).reshape(shape)


_RECORD = msgspec.msgpack.Decoder(dict[str, Any], ext_hook=_array)


_CHUNK = 2**18  # bytes, which stay in a core's cache
_INFINITE = {  # as whole numbers, signed and unsigned: infinity, and minus infinity
    kind: (
        np.array(np.inf, kind).view(f"i{kind.itemsize}"),
        np.array(-np.inf, kind).view(f"u{kind.itemsize}"),
    )
    for kind in TYPES.values()
}


def finite(values: np.ndarray) -> bool:
    """Whether all values are finite, by their bits.

    As whole numbers those of infinity come after all finite ones, and those of NaN after them; as
    unsigned ones those of negative numbers come last, in the same order.

    Args:
      values: of any of `TYPES`, one after another in memory, at any byte.
    """
    positive, negative = _INFINITE[values.dtype]
    content = values.reshape(-1).view(np.uint8)
    for start in range(0, len(content), _CHUNK):
        part = content[start : start + _CHUNK]
        if not values.flags.aligned:  # where reading whole numbers is slow
            part = part.copy()
        if part.view(positive.dtype).max() >= positive:
            return False
        if part.view(negative.dtype).max() >= negative:
            return False
    return True
