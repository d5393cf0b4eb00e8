"""Writes shards: each whole, by one process, with a note that it is there.

Which records lie in which shard depends on their number and size alone, so that any number of
processes, begun any number of times, make the same files.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from jax_distill.data import manifest
from jax_distill.data.manifest import File
from jax_distill.storage import buckets, paths
from jax_distill.storage.files import FileError, partial_of, read_json, remove_leftovers, write_json
from jax_distill.storage.outputs import staged

SHARD_BYTES, SHARD_RECORDS = 2**26, 1024
"""About the size at which a shard ends; what a killed process loses is of the one it was making."""
MOST_SHARDS = 256
"""Of one kind, where that makes them larger: a reader keeps all of them open."""
# Groups of one record: reads are random. Compression would take a twelfth off latents and a fifth
# off captions, and make reading them four times as slow.
_OPTIONS = "group_size:1,uncompressed"


def records_a_shard(count: int, record_bytes: int, batch: int) -> int:
    """The number of records in every shard but the last, a multiple of the batch.

    Args:
      count: of all records.
      record_bytes: about the size of one.
      batch: records that are encoded together, which thus never lie in two shards.
    """
    size = min(max(1, SHARD_BYTES // record_bytes), SHARD_RECORDS)
    size = max(size, -(-count // MOST_SHARDS))
    return -(-size // batch) * batch


def write_shard(path: Path, journal: Path, records: Iterable[bytes]) -> None:
    """Writes a shard, which appears once it is whole and on the disk, then notes it.

    One of a bucket is written in the temporary folder of this host, and copied then.

    Args:
      path: of the shard.
      journal: folder of the notes.
      records: its content.
    """
    made = staged(path) if paths.is_bucket(path) else path
    remove_leftovers(made)
    partial, count = partial_of(made), 0
    try:
        writer = ArrayRecordWriter(str(partial), _OPTIONS)
        try:
            for content in records:
                writer.write(content)
                count += 1
        finally:
            writer.close()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        found = manifest.file_of(partial, count)
        if made is path:
            os.replace(partial, path)
        else:
            buckets.upload_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    write_json(_note(path, journal), {**found, "name": path.name})


def written(path: Path, journal: Path) -> File | None:
    """What is noted of a shard; None unless it is there, and whole."""
    try:
        found = read_json(_note(path, journal), File)
        whole = found["name"] == path.name and paths.size(path) == found["bytes"]
    except (FileNotFoundError, FileError):
        return None
    return found if whole else None


def _note(path: Path, journal: Path) -> Path:
    return journal / f"{path.stem}.json"
