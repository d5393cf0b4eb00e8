"""Parquet files, as those of Hugging Face's data sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_distill.data.sources.rows import (
    Group,
    Rows,
    as_bytes,
    columns_of,
    name_of,
    pyarrow_for,
    reading,
)
from jax_distill.data.sources.source import USUAL, Columns
from jax_distill.storage.files import check_regular


def open_parquet(paths: Sequence[Path], columns: Columns = USUAL) -> Rows:
    """Opens captioned pictures in parquet files; a row group is read at a time.

    Args:
      paths: in order.
      columns: by default, "image", and "text" or "caption".

    Raises:
      FileError: a file is cut short or damaged, or lacks a column.
    """
    arrow = pyarrow_for(paths[0])
    groups = [group for path in paths for group in _groups(path, columns, arrow)]
    return Rows(name_of(paths), groups, _load)


def _load(group: Group) -> tuple[Any, Any]:
    """The columns of a row group."""
    arrow = pyarrow_for(group.path)
    with _opened(group.path, arrow) as file:
        table = file.read_row_group(group.place, columns=list(group.columns))
    image, caption = (table.column(name) for name in group.columns)
    if table.num_rows != group.rows:
        raise ValueError(f"row group {group.place} has {table.num_rows} of {group.rows} rows")
    captions = [as_bytes(chunk, arrow) for chunk in caption.chunks]
    return image, arrow.chunked_array(captions)


def _opened(path: Path, arrow: Any) -> Any:
    return arrow.parquet.ParquetFile(path, page_checksum_verification=True)


def _groups(path: Path, columns: Columns, arrow: Any) -> list[Group]:
    check_regular(path)
    with reading(path), _opened(path, arrow) as file:
        names = columns_of(file.schema_arrow, path, columns, arrow)
        groups, start = [], 0
        for number in range(file.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            groups.append(Group(path, number, start, rows, names))
            start += rows
        if start != file.metadata.num_rows:
            raise ValueError(f"its groups have {start} of {file.metadata.num_rows} rows")
    return groups
