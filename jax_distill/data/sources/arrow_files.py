"""Folders that `datasets.save_to_disk` wrote, and arrow files, without the package `datasets`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

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
from jax_distill.storage.files import FileError, check_regular, read_json

STATE, SPLITS = "state.json", "dataset_dict.json"
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream
_FILE = b"ARROW1"  # begins the other format, which has a table of contents


class _DataFile(TypedDict):
    filename: str


class _State(TypedDict):
    _data_files: list[_DataFile]


class _Splits(TypedDict):
    splits: list[str]


def files_of(folder: Path) -> list[Path]:
    """The arrow files of a data set's folder, in order.

    Raises:
      FileError: it has several splits, or its description is damaged.
    """
    if (folder / SPLITS).exists():
        splits = read_json(folder / SPLITS, _Splits)["splits"]
        raise FileError(
            f"'{folder}' has the splits {', '.join(splits)}; give the folder of one, such as"
            f" '{folder / (splits or ['train'])[0]}'"
        )
    where = f"'{folder / STATE}'"
    state = read_json(folder / STATE, _State)
    if state.get("_indices_data_files"):
        raise FileError(f"{where} selects rows; save the data set anew after flatten_indices()")
    names = [file["filename"] for file in state["_data_files"]]
    for name in names:
        if not re.fullmatch(r"[\w.=-]+\.arrow", name):
            raise FileError(f"{where}: {name!r:.80} is no arrow file beside it; save it anew")
        if not (folder / name).exists():
            raise FileError(f"'{folder / name}' is missing; restore it or save the data set anew")
    if not names:
        raise FileError(f"{where} names no arrow file; save the data set anew")
    return [folder / name for name in names]


def open_arrow(paths: Sequence[Path], columns: Columns = USUAL) -> Rows:
    """Opens captioned pictures in arrow files, which are mapped into memory.

    Args:
      paths: in order.
      columns: by default, "image", and "text" or "caption".

    Raises:
      FileError: a file is cut short or damaged, or lacks a column.
    """
    arrow = pyarrow_for(paths[0])
    groups = [group for path in paths for group in _groups(path, columns, arrow)]
    return Rows(name_of(paths), groups, _load)


def _groups(path: Path, columns: Columns, arrow: Any) -> list[Group]:
    """The record batches of a file; their captions alone are read, to count them."""
    check_regular(path)
    groups, start = [], 0
    with reading(path), arrow.memory_map(str(path)) as source:
        names = columns_of(_reader(source, None, arrow).schema, path, columns, arrow)
        reader = _reader(source, names[1:], arrow)
        for place, batch in _batches(source, reader):
            groups.append(Group(path, place, start, batch.num_rows, names))
            start += batch.num_rows
        size = source.size()
        at_end = source.tell() == size and source.read_at(len(_END), size - len(_END)) == _END
        if not _is_file(source) and not at_end:
            raise ValueError(f"it ends after {len(groups)} batches without a mark")
    return groups


def _load(group: Group) -> tuple[Any, Any]:
    """The columns of a record batch."""
    arrow = pyarrow_for(group.path)
    with arrow.memory_map(str(group.path)) as source:
        reader = _reader(source, group.columns, arrow)
        if _is_file(source):
            batch = reader.get_batch(group.place)
        else:
            if source.tell() != group.place:
                reader.read_next_batch()  # dictionaries of other columns come before the first one
                source.seek(group.place)
            batch = reader.read_next_batch()
    if batch.num_rows != group.rows:
        raise ValueError(f"it has {batch.num_rows} rows where it had {group.rows}")
    batch.validate()
    image, caption = (batch.column(name) for name in group.columns)
    caption = as_bytes(caption, arrow)
    for column in (image, caption):  # a damaged offset would lead out of the file
        column.validate(full=True)
    return image, caption


def _is_file(source: Any) -> bool:
    """Whether this is the format that has a table of contents; otherwise, a stream."""
    return source.read_at(len(_FILE), 0) == _FILE


def _reader(source: Any, names: Sequence[str] | None, arrow: Any) -> Any:
    """A reader of some columns, or of all; it begins with the first batch."""
    make = arrow.ipc.open_file if _is_file(source) else arrow.ipc.open_stream
    source.seek(0)
    if names is None:
        return make(source)
    schema = _reader(source, None, arrow).schema
    fields = sorted(schema.get_field_index(name) for name in names)
    source.seek(0)
    return make(source, options=arrow.ipc.IpcReadOptions(included_fields=fields))


def _batches(source: Any, reader: Any) -> Iterator[tuple[int, Any]]:
    """Each batch, and the place by which `_load` finds it: its number, or where it begins."""
    if _is_file(source):
        for number in range(reader.num_record_batches):
            yield number, reader.get_batch(number)
        return
    place = source.tell()
    for batch in reader:
        yield place, batch
        place = source.tell()
