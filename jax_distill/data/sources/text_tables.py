"""Tables as text: a JSON object a line, or comma-separated values below a line of names."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from jax_distill.data.sources.source import CAPTION_COLUMNS, Columns
from jax_distill.storage.files import FileError, check_kind, read_json_lines, read_lines

ENDINGS = (".jsonl", ".csv")
FILE_COLUMNS = ("file_name", "image")
_MEND = "mend or remove that line"
_NAME = "mend that line, or name the columns with --image_column and --caption_column"


class Line(TypedDict):
    """What is read of a line."""

    where: str  # begins messages, such as "'a.csv', line 3"
    number: int
    file_name: str | None  # None where captions alone are read
    caption: str


def read(path: Path, columns: Columns, *, files: bool) -> Iterator[Line]:
    """Reads the captions of a table in order, and the names of their pictures' files.

    Args:
      path: of a file that ends in one of `ENDINGS`.
      columns: their names; by default `FILE_COLUMNS` and `CAPTION_COLUMNS`, the first that it has.
      files: whether it has names of files.

    Raises:
      FileError: it lacks a column, or a line is no line of a table.
      FileNotFoundError: there is no file.
    """
    rows = _of_csv(path) if path.suffix.lower() == ".csv" else read_json_lines(path)
    taken: list[str] = []
    for number, row in rows:
        where = f"'{path}', line {number}"
        if not taken:
            usual = [(columns.image, FILE_COLUMNS), (columns.caption, CAPTION_COLUMNS)][not files :]
            taken = [given or next(_there(names, row), names[0]) for given, names in usual]
            kind = TypedDict("Row", dict.fromkeys(taken, str))
        fix = _MEND if all(name in row for name in taken) else _NAME
        check_kind(row, kind, where=where, fix=fix)
        file_name = row[taken[0]] if files else None
        yield Line(where=where, number=number, file_name=file_name, caption=row[taken[-1]])


def _there(names: Sequence[str], row: dict) -> Iterator[str]:
    return (name for name in names if name in row)


def _of_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows below the line of names, each with the number of its first line."""
    rows = csv.reader((f"{line}\n" for _, line in read_lines(path)), strict=True)
    names: list[str] = []
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise FileError(
                f"'{path}', line {number} is not valid CSV ({error}); {_MEND}"
            ) from None
        if row is None:
            break
        if not row:
            continue
        if not names:
            names = row
            if len(set(names)) < len(names) or not all(names):
                raise FileError(
                    f"'{path}', line {number}: two columns have one name, or one has none; the"
                    " first line names the columns"
                )
            continue
        if len(row) != len(names):
            raise FileError(
                f"'{path}', line {number} has {len(row)} fields where the first line names"
                f" {len(names)}; put fields with commas or line ends in double quotes"
            )
        yield number, dict(zip(names, row))
    if not names:
        raise FileError(f"'{path}' is empty; its first line names the columns, such as text")
