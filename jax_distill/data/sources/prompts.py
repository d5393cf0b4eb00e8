"""Captions alone, to be drawn by a teacher."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from jax_distill.data.sources import text_tables
from jax_distill.data.sources.source import (
    USUAL,
    Captioned,
    Columns,
    check_caption,
    check_index,
    check_keys,
    check_unread,
    plain_caption,
)
from jax_distill.storage.files import FileError, read_lines


class Prompts:
    """Captions of text files: a line each, or a column of `.jsonl` or `.csv`.

    A key is the file's name and the line's number.

    Args:
      paths: files; those that end in neither are read by lines, and empty lines passed over.
      columns: of tables; by default, see `text_tables.read`.

    Raises:
      FileError: a caption cannot be used, or there is none, or no file has columns and one is
        named.
      FileNotFoundError: a file is missing.
    """

    has_pictures = False

    def __init__(self, paths: Sequence[Path], columns: Columns = USUAL):
        self.name = " and ".join(f"'{path}'" for path in paths)
        if not any(_is_table(path) for path in paths):
            check_unread(columns, self.name)
        self._examples = [example for path in paths for example in _captions(path, columns)]
        if not self._examples:
            raise FileError(f"{self.name} has no caption")
        check_keys((example.key for example in self._examples), self.name)

    def __len__(self) -> int:
        return len(self._examples)

    def key(self, index: int) -> str:
        return self[index].key

    def __getitem__(self, index: int) -> Captioned:
        check_index(index, len(self))
        return self._examples[index]


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in text_tables.ENDINGS


def _captions(path: Path, columns: Columns) -> Iterator[Captioned]:
    if _is_table(path):
        for line in text_tables.read(path, columns, files=False):
            if line.caption is None:
                raise FileError(line.damage)
            check_caption(line.caption, f"'{path}', line {line.number}")
            yield Captioned(f"{path.name}:{line.number}", line.caption, None)
        return
    for number, text in read_lines(path):
        if text.strip():
            caption = plain_caption(text, f"'{path}', line {number}")
            yield Captioned(f"{path.name}:{number}", caption, None)
