"""Writes shards: each whole, by one process, with a note that it is there; and opens them.

Which records lie in which shard depends on their number and size alone, so that any number of
processes, begun any number of times, make the same files.
"""

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import grain
from array_record.python.array_record_module import ArrayRecordWriter

from jax_distill.data import manifest
from jax_distill.data.damaged import Lost
from jax_distill.data.manifest import AGAIN, File
from jax_distill.storage import buckets, paths
from jax_distill.storage.files import (
    FileError,
    PassingError,
    partial_of,
    read_json,
    remove_leftovers,
    unread,
    write_json,
)
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


def open_shards(
    folder: Path, files: Sequence[File], *, skip: bool = False
) -> tuple[grain.sources.ArrayRecordDataSource, list[Lost]]:
    """Opens the shards of one kind, as one sequence of records.

    Args:
      folder: of the shards.
      files: what the manifest says of them.
      skip: whether some may be missing, or damaged as a whole.

    Returns:
      The contents of all records by their numbers; and those that are lost, which it fails to read.

    Raises:
      FileError: a shard cannot be opened, or has not the records that it should; with `skip`, none
        can.
      PassingError: one cannot be read for now.
    """
    try:
        return _opened(folder, files), []
    except PassingError:
        raise
    except FileError as error:
        if not skip:
            raise
        first = error
    lost, names = [], []
    ends = itertools.accumulate(file["records"] for file in files)
    for file, end in zip(files, ends):
        count, name = file["records"], str(folder / file["name"])
        try:
            _opened(folder, [file], f"'{name}'")
        except PassingError:
            raise
        except FileError as error:
            lost.append(Lost(range(end - count, end), str(error)))
            name += f"[0:{count}]"  # which is not opened to count its records
        names.append(name)
    if len(lost) == len(files):
        raise first
    return grain.sources.ArrayRecordDataSource(names), lost


def _opened(
    folder: Path, files: Sequence[File], where: str = ""
) -> grain.sources.ArrayRecordDataSource:
    """Opens shards, which `where` names, that are whole; raises FileError where one is not."""
    where = where or f"a shard of '{folder}'"
    for file in files:
        manifest.check_size(folder / file["name"], file["bytes"])
    try:
        source = grain.sources.ArrayRecordDataSource([str(folder / file["name"]) for file in files])
    except (RuntimeError, ValueError) as error:
        raise unreadable(where, error) from None
    if len(source) != (count := sum(file["records"] for file in files)):
        raise FileError(f"data.path: {where} has {len(source)} of {count} records; {AGAIN}")
    return source


def unreadable(where: str, error: Exception) -> FileError:
    """The error to raise for a record or a file of a folder."""
    where, reason = f"data.path: {where}", str(error).partition("\n")[0]
    return unread(where, error) or FileError(f"{where} cannot be read ({reason}); {AGAIN}")
