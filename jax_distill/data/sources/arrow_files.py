"""Folders that `datasets.save_to_disk` wrote, and arrow files, without the package `datasets`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from jax_distill.data.sources.rows import Group, Rows, as_bytes, columns_of, pyarrow_for, reading
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
    batches: dict[tuple[Path, int], Any] = {}
    groups = []
    for path in paths:
        start = 0
        for number, (batch, names) in enumerate(_batches(path, columns, arrow)):
            batches[path, number] = batch
            groups.append(Group(path, number, start, batch.num_rows, names))
            start += batch.num_rows

    def load(group: Group) -> tuple[Any, Any]:
        batch = batches[group.path, group.number]
        image, caption = (batch.column(name) for name in group.columns)
        caption = as_bytes(caption, arrow)
        for column in (image, caption):  # a damaged offset would lead out of the file
            column.validate(full=True)
        return image, caption

    return Rows(f"'{paths[0]}'" + f" and {len(paths) - 1} more" * (len(paths) > 1), groups, load)


def _batches(path: Path, columns: Columns, arrow: Any) -> list[tuple[Any, tuple[str, str]]]:
    """The record batches of a file, mapped, and the names of the two columns."""
    check_regular(path)
    with reading(path):
        source = arrow.memory_map(str(path))
        whole = source.read_at(len(_FILE), 0) == _FILE
        make = arrow.ipc.open_file if whole else arrow.ipc.open_stream
        schema = make(source).schema
        names = columns_of(schema, path, columns, arrow)
        fields = sorted(schema.get_field_index(name) for name in names)
        source.seek(0)
        reader = make(source, options=arrow.ipc.IpcReadOptions(included_fields=fields))
        if whole:
            found = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        else:
            found = list(reader)
            size = source.size()
            if source.tell() != size or source.read_at(len(_END), size - len(_END)) != _END:
                raise ValueError(f"it ends after {len(found)} batches without a mark")
        for batch in found:
            batch.validate()
    return [(batch, names) for batch in found]
