"""Objects of a bucket: read, replaced only as they were seen, and moved and removed by folders.

A store writes an object whole or not at all, and gives each version of it a number, its generation,
by which a later write or removal can ask for the version that it knows. It has no folders, so that
a folder is neither made nor renamed at once. https://cloud.google.com/storage/docs/consistency

Errors are those of gcsfs, which tries again for a minute before it raises one; `disks` knows them.
"""

import base64
import contextlib
import datetime
import email.utils
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jax_distill.storage import paths

NEW = "0"
"""In the place of a generation: there is no object of that name."""

_BLOCK = 2**24


class Seen(NamedTuple):
    """An object as it was read.

    Attributes:
      content: of it.
      generation: its version.
      silent: seconds since it was written, by the clock of the store.
    """

    content: bytes
    generation: str
    silent: float


def look(path: Path) -> Seen | None:
    """Reads an object, and which version it is; None where there is none."""
    files, bucket, name = _place(path)
    try:
        headers, body = files.call("GET", "b/{}/o/{}", bucket, name)
        found = json.loads(body)
        version = {"alt": "media", "generation": found["generation"]}
        _, content = files.call("GET", "b/{}/o/{}", bucket, name, **version)
    except FileNotFoundError:
        return None
    now = email.utils.parsedate_to_datetime(headers["Date"])
    written = datetime.datetime.fromisoformat(found["updated"])
    return Seen(bytes(content), found["generation"], (now - written).total_seconds())


def put(path: Path, content: bytes, generation: str) -> str | None:
    """Writes an object in the place of the version that is known.

    Args:
      path: of the object.
      content: of it, which no other process writes.
      generation: of the version, or `NEW`.

    Returns:
      The generation of what was written; None where another process was faster.
    """
    files, bucket, name = _place(path)
    address = f"{files._location}/upload/storage/v1/b/{quote(bucket)}/o"
    asked = {"uploadType": "media", "name": name, "ifGenerationMatch": generation}
    try:
        _, body = files.call("POST", address, data=content, **asked)
    except FileExistsError:  # or the answer to the first of two tries was lost
        seen = look(path)
        return seen.generation if seen is not None and seen.content == content else None
    return json.loads(body)["generation"]


def remove(path: Path, generation: str) -> None:
    """Removes an object, if it is still of that version."""
    files, bucket, name = _place(path)
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        files.call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=generation)


def check_bucket(path: Path) -> None:
    """Checks that a bucket is there and can be listed.

    Raises:
      FileNotFoundError: there is no such bucket.
    """
    files, bucket, _ = _place(path)
    try:
        files.call("GET", "b/{}/o", bucket, maxResults=1)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no bucket '{bucket}'") from None


def objects(folder: Path) -> list[Path]:
    """The objects in a folder and below, by name."""
    files = _files()
    return [type(folder)(f"gs://{name}") for name in sorted(files.find(str(folder)))]


def read_all(folder: Path) -> None:
    """Reads every object in a folder and below, so that an error shows as itself."""
    for found in objects(folder):
        for _ in blocks(found):
            pass


def blocks(path: Path) -> Iterator[bytes]:
    """The content of an object, a block at a time."""
    size, files = paths.size(path), _files()
    for start in range(0, size, _BLOCK):
        yield files.cat_file(str(path), start=start, end=min(start + _BLOCK, size))


def upload(folder: Path, to: Path, *, last: Sequence[str] = ()) -> None:
    """Copies the files of a folder of a disk to a bucket, and compares checksums.

    Args:
      folder: of a disk.
      to: the folder in the bucket.
      last: names of files in `folder` itself that come after all others.

    Raises:
      OSError: what is there is not what was sent.
    """
    found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    names = {file: file.relative_to(folder).as_posix() for file in found}
    for file in sorted(found, key=lambda file: (names[file] in last, names[file])):
        upload_file(file, to / names[file])


def upload_file(file: Path, to: Path) -> None:
    """Copies a file of a disk to an object; as `upload`."""
    files = _files()
    files.put_file(str(file), str(to))
    if files.info(str(to)).get("md5Hash") not in (None, _md5(file)):
        raise OSError(f"'{to}' is not what was written; run the same command again")


def _md5(file: Path) -> str:
    """A checksum as the store gives it."""
    with file.open("rb") as content:
        return base64.b64encode(hashlib.file_digest(content, "md5").digest()).decode()


@contextlib.contextmanager
def on_disk(folder: Path) -> Iterator[Path]:
    """A folder for libraries that read none of a bucket: itself, or for a while a copy."""
    if not paths.is_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="jax_distill-") as temporary:
        for found in objects(folder):
            to = Path(temporary, folder.name, found.relative_to(folder))
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(found.read_bytes())
        yield Path(temporary, folder.name)


def move(folder: Path, to: Path) -> None:
    """Moves the objects of a folder: all are copied before the first is removed."""
    files = _files()
    for found in objects(folder):
        files.cp_file(str(found), f"{to}/{found.relative_to(folder)}")
    remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Removes the objects of a folder and below; none need be there."""
    for found in objects(folder):
        with contextlib.suppress(FileNotFoundError):
            _files().rm_file(str(found))


def _files() -> Any:
    """The file system of gcsfs that epath has."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)


def _place(path: Path) -> tuple[Any, str, str]:
    """The file system, the bucket and the name in it."""
    bucket, _, name = str(path).removeprefix("gs://").partition("/")
    return _files(), bucket, name
