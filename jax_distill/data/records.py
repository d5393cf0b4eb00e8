"""Latents with captions on disk: ArrayRecord shards and a description beside them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization

from jax_distill.files import check_no_partial, write_atomically, write_json
from jax_distill.flow import Text

DESCRIPTION, NULL = "dataset.json", "null.msgpack"
SHARD_BYTES = 2**30


class LatentRecord(NamedTuple):
    """One picture and its caption, embedded where that takes large networks."""

    latents: np.ndarray  # (N, C) packed, float16
    caption: str
    sequence: np.ndarray | None = None  # (L, D) bfloat16
    pooled: np.ndarray | None = None  # (P,) bfloat16


class LatentRecords:
    """Random access to a folder that `write` made.

    Raises:
      ValueError: the folder is missing, unfinished, or lacks a shard.
    """

    def __init__(self, path: Path):
        check_no_partial(path, "data.path")
        path = Path(path)
        try:
            self.description = json.loads((path / DESCRIPTION).read_text())
            shards = [path / name for name in self.description["shards"]]
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"data.path: '{path}' has no {DESCRIPTION}; make the folder with"
                " python -m jax_distill.prepare"
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f"data.path: '{path / DESCRIPTION}' is no list of shards; make the folder again"
            ) from None
        if not shards:
            raise ValueError(f"data.path: '{path}' has no examples; make the folder again")
        for shard in shards:
            if not shard.exists():
                raise ValueError(f"data.path: '{shard}' is missing; make the folder again")
        self._path = path
        self._source = grain.sources.ArrayRecordDataSource([str(shard) for shard in shards])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> LatentRecord:
        return LatentRecord(**serialization.msgpack_restore(self._source[index]))

    @property
    def has_null(self) -> bool:
        """Whether the empty caption is there, embedded."""
        return (self._path / NULL).is_file()

    @property
    def null(self) -> Text:
        """The empty caption, embedded, with a leading axis of length one."""
        return Text(**serialization.msgpack_restore((self._path / NULL).read_bytes()))


def write(
    path: Path,
    records: Iterable[LatentRecord],
    description: dict,
    *,
    null: Text | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes records in shards; the description comes last, so half a folder is never read.

    Args:
      path: folder, made if it is missing.
      records: in order.
      description: JSON-able facts about the data set, kept in `dataset.json`.
      null: the empty caption, where captions are embedded.
      shard_bytes: a shard ends with the record that makes it as long as this.
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
