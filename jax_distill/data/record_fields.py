"""The fields of one record: msgpack, as flax writes it, read without trusting it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
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


def unpack(content: bytes, kinds: Mapping[str, type | Array]) -> dict[str, Any]:
    """Reads a record that `pack` made and checks its fields.

    Nothing is allocated that is larger than `content`.

    Args:
      content: of the record.
      kinds: of every field: str, int, bytes, or an `Array`.

    Raises:
      ValueError: `content` is something else, or some of its numbers are not finite.
    """
    if len(content) > RECORD_BYTES:
        raise ValueError(f"it is longer than {RECORD_BYTES >> 20} MiB")
    try:
        fields = msgpack.unpackb(content, ext_hook=_array, max_map_len=len(kinds), max_array_len=0)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"it is not a record: {error}") from None
    if not isinstance(fields, dict) or set(fields) != set(kinds):
        raise ValueError(f"it has not the fields {', '.join(sorted(kinds))}")
    for name, value in fields.items():
        _check(name, value, kinds[name])
    return fields


def _check(name: str, value: Any, kind: type | Array) -> None:
    """Raises ValueError unless a field is of its kind."""
    if not isinstance(kind, Array):
        if type(value) is not kind:
            raise ValueError(f"its field {name} is no {kind.__name__}")
    elif not isinstance(value, np.ndarray):
        raise ValueError(f"its field {name} is no array")
    elif not kind.fits(value):
        raise ValueError(f"its field {name} is {Array(value.shape, value.dtype.name)}, not {kind}")
    elif not _finite(value):
        raise ValueError(f"its field {name} is not finite")


def _array(code: int, content: bytes) -> np.ndarray:
    """Unpacks an array of flax's: its shape, the name of its type, and its bytes."""
    if code != 1:
        raise ValueError(f"extension {code} is not an array")
    shape, name, values = msgpack.unpackb(content, raw=True, max_array_len=3, max_map_len=0)
    kind = TYPES.get(name.decode("latin-1")) if isinstance(name, bytes) else None
    if kind is None:
        raise ValueError(f"type {name!r:.80} is not one of {', '.join(TYPES)}")
    if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
        raise ValueError(f"{shape!r:.80} is not a shape")
    if math.prod(shape) * kind.itemsize != len(values):
        raise ValueError(f"shape {shape!r} does not fit {len(values)} bytes")
    return np.frombuffer(values, kind).reshape(shape)


def _finite(values: np.ndarray) -> bool:
    """Whether all values are finite; comparing bits takes an eighth of the time in bfloat16."""
    bits = np.dtype(f"u{values.itemsize}")
    exponent = np.array(np.inf, values.dtype).view(bits)
    return bool(((values.view(bits) & exponent) != exponent).all())
