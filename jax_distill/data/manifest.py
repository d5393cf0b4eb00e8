"""`dataset.json`: the manifest of a folder of records, with the size and checksum of every file.

    dataset.json                         written last
    latents-00000.array_record ..        an example each: {at, of, key, caption, latents}
    captions-00000.array_record ..       a distinct caption each: {at, of, caption} and, where
                                         captions are embedded, {sequence, pooled}
    null.msgpack                         likewise the empty caption: {sequence, pooled}
    damaged.jsonl                        examples of the source that were left out, and why

`at` is the number of a record among its kind, `of` the manifest's mark. So a record that lies out
of its place, or comes from another folder, is told when it is read. ArrayRecord keeps a checksum of
each record, which is compared then as well. The checksums of whole files are for `verify`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from jax_distill.data.record_fields import TYPES
from jax_distill.storage import paths
from jax_distill.storage.files import (
    FileError,
    check_kind,
    check_no_partial,
    check_regular,
    named,
    read_json,
)

DESCRIPTION, NULL, DAMAGED = "dataset.json", "null.msgpack", "damaged.jsonl"
FORMAT = 2
"""Of the layout above; the first versions' had no number."""
LATENTS, CAPTIONS = "latents", "captions"
"""The kinds of shards."""
AGAIN = "restore it or make the folder again"

_Count = Annotated[int, Meta(ge=1, le=2**40)]
_Type = Literal[tuple(TYPES)]


class File(TypedDict):
    """A file of a folder."""

    name: str
    records: _Count
    bytes: _Count
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class LatentFacts(TypedDict):
    """The latents of an example; beside these, `taken` and `seed` tell how they were made."""

    shape: tuple[_Count, _Count]
    type: _Type


class TextFacts(TypedDict):
    """Embedded captions.

    Attributes:
      sequence: its length and width, (L, D).
      pooled: width of that feature.
      type: of both.
      padding: whether the rows beyond a caption's own are its own too ("kept"), or those of the
        empty caption ("shared").
    """

    sequence: tuple[_Count, _Count]
    pooled: _Count
    type: _Type
    padding: Literal["kept", "shared"]


class Description(TypedDict):
    """The required facts of `dataset.json`, which may hold others as well."""

    format: Literal[2]
    mark: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    examples: _Count
    distinct_captions: _Count
    latents: LatentFacts
    text: NotRequired[TextFacts]
    resolution: NotRequired[tuple[int, int]]  # height and width of the pictures
    world: NotRequired[str]
    shards: dict[Literal["latents", "captions"], list[File]]
    null: NotRequired[File]


def shard_name(kind: str, number: int) -> str:
    """The name of a shard's file."""
    return f"{kind}-{number:05d}.array_record"


def mark_of(facts: Mapping[str, Any]) -> bytes:
    """The mark of a folder that is made with certain facts, 8 bytes."""
    return hashlib.sha256(canonical(facts)).digest()[:8]


def canonical(facts: Any) -> bytes:
    """JSON that is the same for equal facts, whichever their order."""
    return json.dumps(facts, sort_keys=True).encode()


def read(folder: Path, *, whole: bool = True) -> Description:
    """Reads a manifest.

    Args:
      folder: that it is of.
      whole: whether every file that it names is checked to be there, of the size it says.

    Raises:
      FileError: the folder is missing, unfinished, damaged, or of an earlier version.
    """
    check_no_partial(folder, "data.path")
    folder = paths.path(folder)
    path = folder / DESCRIPTION
    try:
        found = read_json(path, fix=AGAIN)
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(
            f"data.path: '{folder}' has no {DESCRIPTION}; make the folder with"
            " python -m jax_distill.prepare"
        ) from None
    if "format" not in found and isinstance(found.get("shards"), list):
        raise FileError(
            f"data.path: '{folder}' was prepared by an earlier version; prepare it again (the data"
            " that a run has made for itself is made anew once it is removed)"
        )
    check_kind(found, Description, where=f"'{path}'", fix=AGAIN)
    if ("text" in found) != ("null" in found):
        raise FileError(f"'{path}' has only one of text and null; {AGAIN}")
    for kind, count in ((LATENTS, "examples"), (CAPTIONS, "distinct_captions")):
        _check_shards(path, kind, found["shards"].get(kind, []), found[count])
    if "null" in found and found["null"]["name"] != NULL:
        raise FileError(f"'{path}': {found['null']['name']!r:.80} is not {NULL}; {AGAIN}")
    for file in files_of(found) if whole else ():
        check_size(folder / file["name"], file["bytes"])
    return found


def files_of(description: Description) -> Iterator[File]:
    """Every file that a manifest names."""
    for kind in (LATENTS, CAPTIONS):
        yield from description["shards"][kind]
    if "null" in description:
        yield description["null"]


def _check_shards(path: Path, kind: str, shards: Sequence[File], count: int) -> None:
    """Raises FileError unless shards have their names, which lead nowhere else, and all records."""
    for number, file in enumerate(shards):
        if file["name"] != shard_name(kind, number):
            wanted = shard_name(kind, number)
            raise FileError(f"'{path}': {file['name']!r:.80} is not the shard {wanted}; {AGAIN}")
    found = sum(file["records"] for file in shards)
    if found != count:
        raise FileError(f"'{path}': its {kind} shards have {found} of {count} records; {AGAIN}")


def check_size(path: Path, size: int) -> None:
    """Raises FileError unless a file of a folder is there, and has so many bytes."""
    try:
        check_regular(path)
        found = paths.size(path)
    except FileNotFoundError:
        raise FileError(f"data.path: '{path}' is missing; {AGAIN}") from None
    if found != size:
        raise FileError(f"data.path: '{path}' has {found} bytes, and {size} were written; {AGAIN}")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with named(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_of(path: Path, records: int) -> File:
    """What a manifest says of a file that is written."""
    size = paths.size(path)
    return {"name": path.name, "records": records, "bytes": size, "sha256": checksum(path)}


def verify(folder: Path) -> Description:
    """Reads every file of a folder and compares its checksum.

    Raises:
      FileError: as `read`; or a file holds something else than was written.
    """
    description = read(folder)
    for file in files_of(description):
        if checksum(folder / file["name"]) != file["sha256"]:
            raise FileError(
                f"data.path: '{folder / file['name']}' holds something else than was written (its"
                f" checksum is another); {AGAIN}"
            )
    return description
