"""Folders of pictures, with captions beside them or in a table."""

import os
from collections import Counter
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
    check_index,
    check_inside,
    check_keys,
    check_unread,
    endings_told,
    is_hidden,
    plain_caption,
)
from jax_distill.storage import disks
from jax_distill.storage.files import FileError, read_text

METADATA = "metadata.jsonl"
TABLES = (METADATA, "metadata.csv", text_tables.PARQUET, "captions.jsonl", "captions.csv")

_HIDDEN = "files or folders are left out: hidden, or of another system"
_LINK = "folders are left out: links to them are not followed"
_OTHER = "files are left out: of other endings, and no captions of a picture"
_UNLISTED = "files are left out: not listed in the folder's table"
_REPEATED = "lines name a picture that another line names: each is an example"


class _Example(NamedTuple):
    name: str  # of its file below the folder; of a damaged line, the table's name and its number
    text: str = ".txt"  # ending of the file beside it that has the caption
    table: Path | None = None  # where a table has it
    line: text_tables.Line | None = None  # there


class _LeftOut:
    """Files and folders that are left out: their number and the first, by the reason."""

    def __init__(self):
        self.counts, self.endings = Counter(), Counter()
        self.first: dict[str, Path] = {}

    def add(self, reason: str, path: Path) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, path)
        if reason == _OTHER:
            self.endings[path.suffix.lower()] += 1


class PictureFolder:
    """The pictures of a folder, then those of its subfolders, each sorted by name.

    Captions are in a text file beside each picture, `cat.txt` for `cat.png`. A folder with a table,
    one of `TABLES`, is read by that alone, in its order: a line a picture, `file_name` and `text`.
    Hidden files and links to folders are skipped. The log counts skipped files.

    A key is the path below the folder; a picture that is listed again has a number after it, and a
    line of a table that names none has the table's path and the line's number.

    Args:
      folder: to look in.
      columns: of tables; by default, see `text_tables.read`.

    Raises:
      FileError: the folder is missing or has no pictures, or a table cannot be used, or columns
        are named and there is no table.
    """

    has_pictures = True

    def __init__(self, folder: Path, columns: Columns = USUAL):
        self._folder = folder = Path(folder)
        self.name = f"'{folder}'"
        if not folder.is_dir():
            raise FileError(f"'{folder}' is not a folder; give one of pictures with captions")
        left_out = _LeftOut()
        self._examples = list(_walk(folder, columns, left_out))
        for reason, count in left_out.counts.items():
            first = left_out.first[reason]
            logging.warning("'%s': %d %s, such as '%s'", folder, count, reason, first)
        if not self._examples:
            others = endings_told(left_out.endings)
            raise FileError(
                f"'{folder}' has no pictures ({', '.join(pictures.endings())}) and no"
                f" {METADATA} that lists some"
                + f", but files that end in {others}" * bool(others)
                + "; give a folder of pictures"
            )
        if not any(example.table for example in self._examples):
            check_unread(columns, self.name)
        self._keys, times = [], Counter()
        for name, *_ in self._examples:
            times[name] += 1
            self._keys.append(f"{name}#{times[name]}" if times[name] > 1 else name)
        check_keys(self._keys, self.name)

    def __len__(self) -> int:
        return len(self._examples)

    def key(self, index: int) -> str:
        check_index(index, len(self))
        return self._keys[index]

    def __getitem__(self, index: int) -> Captioned:
        key = self.key(index)
        name, text, table, line = self._examples[index]
        path = self._folder / name
        if table is None:
            return Captioned(key, _beside(path, text), pictures.load(path))
        if line.damage:
            raise FileError(line.damage)
        where = f"'{table}', line {line.number}"
        if not _is_there(path):
            raise FileError(
                f"{where}: {line.file_name!r:.200} is missing; restore the file or remove the line"
            )
        check_caption(line.caption, where)
        return Captioned(key, line.caption, pictures.load(path))


def _walk(root: Path, columns: Columns, left_out: _LeftOut) -> Iterator[_Example]:
    """The pictures of a folder and below it; adds other files to `left_out`."""
    waiting = [root]  # the next one last
    while waiting:
        folder = waiting.pop()
        tables = [name for name in TABLES if _is_there(folder / name, follow=False)]
        if len(tables) > 1:
            raise FileError(
                f"'{folder}' has several tables ({', '.join(tables)}); keep one of them"
            )
        if tables:
            yield from _listed(root, folder / tables[0], columns, left_out)
            continue
        here, below, others = [], [], []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = folder / entry.name
            if is_hidden(entry.name):
                left_out.add(_HIDDEN, path)
            elif entry.is_dir(follow_symlinks=False):
                below.append(path)
            elif entry.is_dir():
                left_out.add(_LINK, path)
            elif path.suffix.lower() in pictures.endings():
                here.append(path)
            else:
                others.append(path)
        # Of a.TXT and a.txt, which sort in this order, the last one counts.
        texts = {path.stem: path.suffix for path in others if path.suffix.lower() == ".txt"}
        captions = {path.with_suffix(texts.get(path.stem, ".txt")) for path in here}
        for path in others:
            if path not in captions:
                left_out.add(_OTHER, path)
        for path in here:
            name = path.relative_to(root).as_posix()
            yield _Example(name, texts.get(path.stem, ".txt"))
        waiting += reversed(below)


def _listed(root: Path, table: Path, columns: Columns, left_out: _LeftOut) -> Iterator[_Example]:
    """The pictures listed in a table; a line that names none in its folder is damaged."""
    known = set()
    for line in text_tables.read(table, columns, files=True):
        path = table.with_name(f"{table.name}:{line.number}")
        if line.file_name is not None:
            try:
                inside = check_inside(line.file_name, f"'{table}', line {line.number}")
            except FileError as error:
                line = line._replace(damage=line.damage or str(error))
            else:
                path = table.parent / inside
        if path in known:
            left_out.add(_REPEATED, path)
        known.add(path)
        yield _Example(path.relative_to(root).as_posix(), table=table, line=line)
    known.add(table)
    for path in sorted(path for path in table.parent.rglob("*") if not path.is_dir()):
        if path not in known:
            left_out.add(_UNLISTED, path)


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


def _beside(picture: Path, ending: str) -> str:
    """The caption in the text file beside a picture, without blanks around it."""
    path = picture.with_suffix(ending)
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise FileError(
            f"'{picture}' has no caption; write it into '{path}', or all of them into"
            f" '{picture.parent / METADATA}'"
        ) from None
    return plain_caption(text, f"'{path}'")
