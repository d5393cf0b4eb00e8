"""Folders of pictures, with captions beside them or in a table."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import logging

from jax_distill.data import pictures
from jax_distill.data.sources import text_tables
from jax_distill.data.sources.source import (
    USUAL,
    Captioned,
    Columns,
    check_caption,
    check_inside,
    check_keys,
    plain_caption,
)
from jax_distill.storage import disks
from jax_distill.storage.files import FileError, read_text

METADATA = "metadata.jsonl"
TABLES = (METADATA, "metadata.csv", "captions.jsonl", "captions.csv")

_HIDDEN = "files or folders are left out: hidden, or of another system"
_LINK = "folders are left out: links to them are not followed"
_OTHER = "files are left out: of other endings, and no captions of a picture"
_UNLISTED = "files are left out: not listed in the folder's table"
_REPEATED = "lines name a picture that another line names: each is an example"


class _Found(NamedTuple):
    path: Path
    caption: str | None = None  # None where it is in a file beside the picture
    name: str = ""  # in a table that lists it
    where: str = ""  # the line there, which begins messages


class PictureFolder:
    """The pictures of a folder, then those of its subfolders, each sorted by name.

    Captions are in a text file beside each picture, `cat.txt` for `cat.png`. A folder with a table,
    one of `TABLES`, is read by that alone, in its order: a line a picture, `file_name` and `text`.
    Hidden files and links to folders are skipped. The log counts skipped files.

    A key is the path below the folder; a picture that is listed again has a number after it.

    Args:
      folder: to look in.
      columns: of tables; by default, see `text_tables.read`.

    Raises:
      FileError: the folder is missing or has no pictures, or a table or what it lists cannot be
        used.
    """

    has_pictures = True

    def __init__(self, folder: Path, columns: Columns = USUAL):
        folder = Path(folder)
        self.name = f"'{folder}'"
        if not folder.is_dir():
            raise FileError(f"'{folder}' is not a folder; give one of pictures with captions")
        left_out: dict[str, list[Path]] = defaultdict(list)
        self._found = list(_walk(folder, columns, left_out))
        for reason, paths in left_out.items():
            logging.warning("'%s': %d %s, such as '%s'", folder, len(paths), reason, paths[0])
        if not self._found:
            raise FileError(
                f"'{folder}' has no pictures ({', '.join(pictures.endings())}) and no {METADATA}"
            )
        self._keys, times = [], Counter()
        for found in self._found:
            key = found.path.relative_to(folder).as_posix()
            times[key] += 1
            self._keys.append(f"{key}#{times[key]}" if times[key] > 1 else key)
        check_keys(self._keys, self.name)

    def __len__(self) -> int:
        return len(self._found)

    def key(self, index: int) -> str:
        return self._keys[index]

    def __getitem__(self, index: int) -> Captioned:
        path, caption, name, where = self._found[index]
        if caption is None:
            caption = _beside(path)
        elif not _is_there(path):
            raise FileError(
                f"{where}: {name!r:.200} is missing; restore the file or remove the line"
            )
        else:
            check_caption(caption, where)
        return Captioned(self._keys[index], caption, pictures.load(path))


def _walk(folder: Path, columns: Columns, left_out: dict[str, list[Path]]) -> Iterator[_Found]:
    """The pictures of a folder and below it; adds other files to `left_out`, by the reason."""
    waiting = [folder]  # the next one last
    while waiting:
        folder = waiting.pop()
        tables = [name for name in TABLES if _is_there(folder / name, follow=False)]
        if len(tables) > 1:
            raise FileError(
                f"'{folder}' has several tables ({', '.join(tables)}); keep one of them"
            )
        if tables:
            yield from _listed(folder / tables[0], columns, left_out)
            continue
        here, below, others = [], [], []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                left_out[_HIDDEN].append(path)
            elif entry.is_dir(follow_symlinks=False):
                below.append(path)
            elif entry.is_dir():
                left_out[_LINK].append(path)
            elif path.suffix.lower() in pictures.endings():
                here.append(path)
            else:
                others.append(path)
        captions = {path.with_suffix(".txt") for path in here}
        if others := [path for path in others if path not in captions]:
            left_out[_OTHER] += others
        yield from (_Found(path) for path in here)
        waiting += reversed(below)


def _listed(table: Path, columns: Columns, left_out: dict[str, list[Path]]) -> Iterator[_Found]:
    """The pictures listed in a table, none of them outside of its folder."""
    listed = set()
    for line in text_tables.read(table, columns, files=True):
        path = table.parent / check_inside(line["file_name"], line["where"])
        if path in listed:
            left_out[_REPEATED].append(path)
        listed.add(path)
        yield _Found(path, line["caption"], line["file_name"], line["where"])
    listed.add(table)
    files = sorted(path for path in table.parent.rglob("*") if not path.is_dir())
    if unlisted := [path for path in files if path not in listed]:
        left_out[_UNLISTED] += unlisted


def _is_there(path: Path, *, follow: bool = True) -> bool:
    """Whether there is a file; `os.path.exists` calls it missing when its disk fails.

    Raises:
      OSError: an error that may pass, such as of rights.
    """
    try:
        os.stat(path, follow_symlinks=follow)
    except (OSError, ValueError) as error:  # ValueErrors are of names that no file can have
        if disks.raised(error):
            raise
        return False
    return True


def _beside(picture: Path) -> str:
    """The caption in the text file beside a picture, without blanks around it."""
    path = picture.with_suffix(".txt")
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise FileError(
            f"'{picture}' has no caption; write it into '{path}', or all of them into"
            f" '{picture.parent / METADATA}'"
        ) from None
    return plain_caption(text, f"'{path}'")
