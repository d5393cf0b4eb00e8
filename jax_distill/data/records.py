"""Latents with captions on disk: ArrayRecord shards and a description beside them."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import grain
import ml_dtypes
import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization

from jax_distill.flow import Text
from jax_distill.storage import paths
from jax_distill.storage.files import (
    FileError,
    check_no_partial,
    check_regular,
    named,
    read_json,
    unread,
    write_atomically,
    write_json,
)

DESCRIPTION, NULL = "dataset.json", "null.msgpack"
SHARD_BYTES = 2**30
RECORD_BYTES = 2**27  # many times FLUX's: 2 MiB of caption and up to as much of picture

_AGAIN = "restore it or make the folder again"
_TYPES = {
    np.dtype(kind).name.encode(): np.dtype(kind)
    for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
}


class LatentRecord(NamedTuple):
    """One picture and its caption, stored embedded where that takes large networks."""

    latents: np.ndarray  # (N, C) packed, float16
    caption: str
    sequence: np.ndarray | None = None  # (L, D) bfloat16
    pooled: np.ndarray | None = None  # (P,) bfloat16


class Description(TypedDict):
    """The required facts of `dataset.json`, which may hold others as well."""

    shards: list[str]
    examples: NotRequired[int]
    resolution: NotRequired[tuple[int, int]]  # height and width of the pictures
    world: NotRequired[str]


class LatentRecords:
    """Random access to a folder written by `write`.

    Raises:
      ValueError: the folder is missing, unfinished, damaged, or lacks a shard or examples.
    """

    def __init__(self, path: Path):
        check_no_partial(path, "data.path")
        self._path = path = paths.path(path)
        try:
            self.description = read_json(path / DESCRIPTION, Description, fix=_AGAIN)
        except (FileNotFoundError, NotADirectoryError):
            raise FileError(
                f"data.path: '{path}' has no {DESCRIPTION}; make the folder with"
                " python -m jax_distill.prepare"
            ) from None
        shards = [self._shard(name) for name in self.description["shards"]]
        if not shards:
            raise FileError(f"data.path: '{path}' has no examples; {_AGAIN}")
        try:
            self._source = grain.sources.ArrayRecordDataSource([str(shard) for shard in shards])
        except (RuntimeError, ValueError) as error:
            raise self._unreadable("a shard", error) from None
        found, told = len(self), self.description.get("examples", len(self))
        if not found or found != told:
            raise FileError(f"data.path: '{path}' has {found} of {told} examples; {_AGAIN}")
        self._layout: dict | None = None
        self._layout = _layout(self[0])

    def _shard(self, name: str) -> Path:
        """The file of a shard; its name leads nowhere else, nor is interpreted by ArrayRecord."""
        if not re.fullmatch(r"[\w.-]+\.array_record", name):
            raise FileError(f"'{self._path / DESCRIPTION}': {name!r:.80} is not a shard; {_AGAIN}")
        shard = self._path / name
        try:
            check_regular(shard)
        except FileNotFoundError:
            raise FileError(f"data.path: '{shard}' is missing; {_AGAIN}") from None
        return shard

    def _unreadable(self, what: str, error: Exception) -> FileError:
        where = f"data.path: {what} of '{self._path}'"
        reason = str(error).partition("\n")[0]
        return unread(where, error) or FileError(f"{where} cannot be read ({reason}); {_AGAIN}")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> LatentRecord:
        """One example.

        Raises:
          FileError: it is damaged, not finite, or its shapes and types differ from the first's.
        """
        what = f"example {index}"
        try:
            record = LatentRecord(**restore(self._source[index], LatentRecord, ranks=(2, 2, 1)))
        except (RuntimeError, ValueError) as error:
            raise self._unreadable(what, error) from None
        if self._layout not in (None, _layout(record)):
            error = ValueError(f"{_layout(record)} is unlike the first one's {self._layout}")
            raise self._unreadable(what, error)
        return record

    @property
    def has_null(self) -> bool:
        """Whether the folder holds the empty caption, embedded."""
        return (self._path / NULL).is_file()

    @property
    def null(self) -> Text:
        """The empty caption, embedded, with a leading axis of length one.

        Raises:
          FileError: it is missing or damaged, or its shapes and types differ from the captions'.
        """
        try:
            check_regular(self._path / NULL)
            with named(self._path / NULL), (self._path / NULL).open("rb") as file:
                text = Text(**restore(file.read(RECORD_BYTES + 1), Text, ranks=(3, 2)))
            expected = {name: self._layout.get(name) for name in Text._fields}
            found = {name: (shape[1:], kind) for name, (shape, kind) in _layout(text).items()}
            if found != expected or any(len(leaf) != 1 for leaf in text):
                raise ValueError(f"{_layout(text)} is unlike the captions' {expected}")
        except (FileNotFoundError, ValueError) as error:
            raise self._unreadable(f"{NULL}", error) from None
        return text


def restore(content: bytes, kind: type[NamedTuple], ranks: tuple[int, ...]) -> dict[str, Any]:
    """Reads and checks the fields of a record that `flax.serialization.msgpack_serialize` wrote.

    Nothing is allocated that is larger than `content`.

    Args:
      content: msgpack, a map of text and arrays.
      kind: `LatentRecord` or `Text`; its fields with defaults may be missing, all of them or none.
      ranks: number of axes of each of its arrays.

    Raises:
      ValueError: `content` is something else, or some of its numbers are not finite.
    """
    if len(content) > RECORD_BYTES:
        raise ValueError(f"it is longer than {RECORD_BYTES >> 20} MiB")
    try:
        fields = msgpack.unpackb(
            content, ext_hook=_array, max_map_len=len(kind._fields), max_array_len=0
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"it is not a record: {error}") from None
    required = [name for name in kind._fields if name not in kind._field_defaults]
    if not isinstance(fields, dict) or set(fields) not in (set(required), set(kind._fields)):
        raise ValueError(f"it lacks some of the fields {', '.join(required)}")
    arrays = [name for name in kind._fields if name != "caption"]
    for name, value in fields.items():
        if name == "caption":
            if not isinstance(value, str):
                raise ValueError("its caption is not text")
            continue
        rank = ranks[arrays.index(name)]
        if not isinstance(value, np.ndarray) or value.ndim != rank or not value.size:
            raise ValueError(f"its {name} are not an array of {rank} axes")
        if not _finite(value):
            raise ValueError(f"its {name} are not finite")
    return fields


def _array(code: int, content: bytes) -> np.ndarray:
    """Unpacks an array of flax's: its shape, the name of its type, and its bytes."""
    if code != 1:
        raise ValueError(f"extension {code} is not an array")
    shape, name, values = msgpack.unpackb(content, raw=True, max_array_len=3, max_map_len=0)
    kind = _TYPES.get(name)
    if kind is None:
        raise ValueError(f"type {name!r:.80} is not one of {', '.join(map(str, _TYPES.values()))}")
    if not (isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)):
        raise ValueError(f"{shape!r:.80} is not a shape")
    if math.prod(shape) * kind.itemsize != len(values):
        raise ValueError(f"shape {shape!r} does not fit {len(values)} bytes")
    return np.frombuffer(values, kind).reshape(shape)


def _finite(values: np.ndarray) -> bool:
    """Whether all values are finite; comparing bits takes an eighth of the time in bfloat16."""
    bits = np.dtype(f"u{values.itemsize}")
    exponent = np.array(np.inf, values.dtype).view(bits)
    return bool(((values.view(bits) & exponent) != exponent).all())


def _layout(arrays: NamedTuple) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shapes and types of the arrays among the fields."""
    fields = arrays._asdict().items()
    return {k: (v.shape, v.dtype.name) for k, v in fields if isinstance(v, np.ndarray)}


def write(
    path: Path,
    records: Iterable[LatentRecord],
    description: dict,
    *,
    null: Text | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes records in shards, and the description last, so that half a folder is never read.

    Args:
      path: folder, created if it is missing.
      records: in order.
      description: JSON-able facts about the data set, kept in `dataset.json`.
      null: the empty caption, where captions are embedded.
      shard_bytes: length at which a shard is closed, reached by its last record.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / DESCRIPTION).unlink(missing_ok=True)
    shards: list[str] = []
    writer, written = None, 0
    for record in records:
        if writer is None:
            shards.append(f"latents-{len(shards):05d}.array_record")
            # Groups of one record: reads are random.
            writer, written = ArrayRecordWriter(str(path / shards[-1]), "group_size:1"), 0
        fields = {name: value for name, value in record._asdict().items() if value is not None}
        content = serialization.msgpack_serialize(fields)
        writer.write(content)
        written += len(content)
        if written >= shard_bytes:
            writer.close()
            writer = None
    if writer:
        writer.close()
    if null is not None:
        write_atomically(path / NULL, serialization.msgpack_serialize(null._asdict()))
    write_json(path / DESCRIPTION, {**description, "shards": shards})
