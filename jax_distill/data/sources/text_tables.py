"""Tables of captions and names: a JSON object a line, comma-separated values, or parquet."""

import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from jax_distill.data.sources.rows import pyarrow_for, reading
from jax_distill.data.sources.source import CAPTION_COLUMNS, Columns
from jax_distill.storage.files import FileError, check_kind, check_regular, parse_json, read_lines

ENDINGS = (".jsonl", ".csv")
PARQUET = "metadata.parquet"  # Hugging Face's name of one that lists files
FILE_COLUMNS = ("file_name", "image")
_MEND = "mend or remove that line"
_NAME = "mend that line, or name the columns with --image_column and --caption_column"


class Line(NamedTuple):
    """What is read of a line."""

    number: int
    file_name: str | None  # None where captions alone are read, or it is damaged
    caption: str | None  # None where the line is damaged
    damage: str | None = None  # a sentence


def read(path: Path, columns: Columns, *, files: bool) -> Iterator[Line]:
    """Reads the captions of a table in order, and the names of their pictures' files.

    Args:
      path: of a file that ends in one of `ENDINGS`, or is named `PARQUET`.
      columns: their names; by default `FILE_COLUMNS` and `CAPTION_COLUMNS`, the first that it has.
      files: whether it has names of files.

    Returns:
      The lines, damaged ones among them: those that lack a column or hold something else there.

    Raises:
      FileError: it is no table, so that nobody knows which lines it has.
      FileNotFoundError: there is no file.
    """
    ending = path.suffix.lower()
    read_rows = {".csv": _of_csv, ".parquet": _of_parquet}.get(ending, _of_json_lines)
    usual = {"file_name": FILE_COLUMNS, "caption": CAPTION_COLUMNS}
    names = {"file_name": columns.image, "caption": columns.caption}
    if not files:
        del usual["file_name"]
    for number, row in read_rows(path):
        if isinstance(row, FileError):
            yield Line(number, None, None, str(row))
            continue
        for what, known in usual.items():
            names[what] = names[what] or next((name for name in known if name in row), None)
        wanted = {what: names[what] or known[0] for what, known in usual.items()}
        fix = _MEND if all(name in row for name in wanted.values()) else _NAME
        try:
            check_kind(row, _texts(*wanted.values()), where=f"'{path}', line {number}", fix=fix)
        except FileError as error:
            file_name = row.get(wanted.get("file_name"))
            yield Line(number, file_name if isinstance(file_name, str) else None, None, str(error))
        else:
            file_name = row[wanted["file_name"]] if files else None
            yield Line(number, file_name, row[wanted["caption"]])


@functools.cache
def _texts(*names: str) -> Any:
    """The type of rows that have text in these columns."""
    return TypedDict("Row", dict.fromkeys(names, str))


def _of_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | FileError]]:
    """The rows with their lines' numbers, or what is wrong with one; empty lines are skipped."""
    for number, text in read_lines(path):
        if not text.strip():
            continue
        try:
            yield number, parse_json(text, dict, where=f"'{path}', line {number}", fix=_MEND)
        except FileError as error:
            yield number, error


def lists_files(path: Path) -> bool:
    """Whether a parquet file is a table of files, and no data set with pictures in it."""
    with reading(path), pyarrow_for(path).parquet.ParquetFile(path) as file:
        return FILE_COLUMNS[0] in file.schema_arrow.names


def _of_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `_of_json_lines`, of rows, the first of which is line 1."""
    number = 0
    check_regular(path)
    with reading(path), pyarrow_for(path).parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _of_csv(path: Path) -> Iterator[tuple[int, dict[str, str] | FileError]]:
    """As `_of_json_lines`, of the rows below the line of names, by the first of their lines."""
    rows = csv.reader((f"{line}\n" for _, line in read_lines(path)), strict=True)
    names: list[str] = []
    while True:
        number = rows.line_num + 1
        where = f"'{path}', line {number}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise FileError(f"{where} is not valid CSV ({error}); {_MEND}") from None
        if row is None:
            break
        if not row:
            continue
        if not names:
            names = row
            _check_names(names, where)
        elif len(row) != len(names):
            yield (
                number,
                FileError(
                    f"{where} has {len(row)} fields where the first line names {len(names)}; put"
                    " fields with commas or line ends in double quotes"
                ),
            )
        else:
            yield number, dict(zip(names, row))
    if not names:
        raise FileError(f"'{path}' is empty; its first line names the columns, such as text")


def _check_names(names: list[str], where: str) -> None:
    if len(names) == 1 and (mark := next((x for x in ";\t|" if x in names[0]), None)):
        raise FileError(f"{where}: columns are separated by {mark!r}; separate them by commas")
    if blank := next((name for name in names if name != name.strip()), None):
        raise FileError(
            f"{where}: column {blank!r:.200} has blanks around its name; separate columns by commas"
            " alone"
        )
    if len(set(names)) < len(names) or not all(names):
        raise FileError(
            f"{where}: two columns have one name, or one has none; the first line names the columns"
        )
