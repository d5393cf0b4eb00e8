"""Rows of Arrow's tables, in memory a group at a time: what parquet and arrow files share."""

import bisect
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jax_distill.data import pictures
from jax_distill.data.pictures import Encoded
from jax_distill.data.sources.source import (
    Captioned,
    Columns,
    check_caption,
    check_index,
    check_inside,
    check_keys,
)
from jax_distill.storage import disks
from jax_distill.storage.files import FileError, PassingError, unread

if TYPE_CHECKING:
    import pyarrow

    Arrays = tuple[pyarrow.Array, pyarrow.Array]

IMAGE_COLUMNS = ("image",)
KEPT, KEPT_BYTES = 8, 2**30
"""The most groups that are kept, and the bytes that several may have together: threads that read
in order are as far apart as they are many."""


class Group(NamedTuple):
    """Rows of a file that are read together."""

    path: Path
    place: int  # in the file: the group's number, or the byte at which it begins
    start: int  # the file's row that is its first
    rows: int
    columns: tuple[str, str]  # of pictures and of captions


class Rows:
    """Captioned pictures in rows of files; a key is the file's name and the row, from 0.

    Pictures are bytes, or Hugging Face's structure of bytes and a path; without bytes, the path is
    that of a file beside the table. The groups that were used last are kept, see `KEPT`; of large
    ones, one: reads in order are cheap, by several threads too, those in random order read a group
    each. Threads take turns at reading a group.

    Args:
      name: of the source.
      groups: in order.
      load: reads a group's two columns, pictures and captions, each as an array of binary type
        or of structures of it; can be pickled.

    Raises:
      FileError: there is no row, or two files have one name.
    """

    has_pictures = True

    def __init__(self, name: str, groups: Sequence[Group], load: "Callable[[Group], Arrays]"):
        self.name = name
        self._groups = [group for group in groups if group.rows]
        if not self._groups:
            raise FileError(f"{name} has no rows; give files that have some")
        names = list({group.path: group.path.name for group in groups}.values())
        check_keys(names, name, "files have the name")
        self._ends = list(itertools.accumulate(group.rows for group in self._groups))
        self._load = load
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs, which reads groups anew."""
        return {key: x for key, x in vars(self).items() if key not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()
        self._kept: OrderedDict[Group, Arrays | FileError] = OrderedDict()  # the last used last

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[Group, int]:
        """The group that has an example, and its row there."""
        check_index(index, len(self))
        place = bisect.bisect_right(self._ends, index)
        group = self._groups[place]
        return group, index - (self._ends[place] - group.rows)

    def key(self, index: int) -> str:
        group, row = self._place(index)
        return f"{group.path.name}:{group.start + row}"

    def __getitem__(self, index: int) -> Captioned:
        group, row = self._place(index)
        where = f"'{group.path}', row {group.start + row}"
        columns = self._columns(group)
        if isinstance(columns, FileError):
            raise FileError(str(columns))
        with reading(group.path):
            picture, caption = (column[row].as_py() for column in columns)
        return Captioned(
            self.key(index), self._caption(caption, where), _picture(picture, where, group)
        )

    def _columns(self, group: Group) -> "Arrays | FileError":
        """The columns of a group; what is wrong if it is damaged, so that it is read only once."""
        with self._lock:
            if group not in self._kept:
                self._make_room()
                self._kept[group] = _read(self._load, group)
            self._kept.move_to_end(group)
            return self._kept[group]

    def _make_room(self) -> None:
        """Forgets groups until there is room for one more, as large as the largest that is kept."""
        sizes = [_bytes(columns) for columns in self._kept.values()]
        while sizes and (len(sizes) >= KEPT or sum(sizes) + max(sizes) > KEPT_BYTES):
            self._kept.popitem(last=False)
            sizes.pop(0)

    def _caption(self, value: bytes | None, where: str) -> str:
        try:
            caption = (value or b"").decode()
        except UnicodeDecodeError as error:
            raise FileError(
                f"{where}: the caption is not UTF-8 text ({error.reason}); write it as UTF-8"
            ) from None
        check_caption(caption, where)
        return caption


def _read(load: "Callable[[Group], Arrays]", group: Group) -> "Arrays | FileError":
    try:
        with reading(group.path):
            return load(group)
    except PassingError:
        raise
    except FileError as error:
        return error


def _bytes(columns: "Arrays | FileError") -> int:
    return 0 if isinstance(columns, FileError) else sum(column.nbytes for column in columns)


def _picture(value: Any, where: str, group: Group) -> Encoded:
    if isinstance(value, dict):
        content, path = value["bytes"], value.get("path")
        if content is None and path:
            return pictures.load(group.path.parent / check_inside(path, where))
    else:
        content = value
    if not content:
        raise FileError(
            f"{where}: {group.columns[0]!r} has no picture; write its bytes or take the row away"
        )
    return Encoded(content, where)


def pyarrow_for(path: Path) -> Any:
    """Imports pyarrow, which reads a file.

    Raises:
      FileError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise FileError(
            f"'{path}' is read by pyarrow, which is missing; pip install 'jax-distill[data]'"
        ) from None
    return pyarrow


def name_of(paths: Sequence[Path]) -> str:
    """The name of a source of so many files, for messages."""
    return f"'{paths[0]}'" + f" and {len(paths) - 1} more" * (len(paths) > 1)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Names the file in any error of pyarrow's."""
    try:
        yield
    except FileError:
        raise
    except FileNotFoundError:
        raise FileError(f"'{path}' is missing; restore it") from None
    except Exception as error:  # of damaged files, nearly every kind
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise unread(f"'{path}'", error, disks.raised) or FileError(
            f"'{path}' is cut short or damaged ({reason}); restore it or write it again"
        ) from None


def columns_of(
    schema: "pyarrow.Schema", path: Path, columns: Columns, arrow: Any
) -> tuple[str, str]:
    """Finds the columns of pictures and captions.

    Raises:
      FileError: one is missing, named twice, or of another type.
    """
    where, names = f"'{path}'", schema.names
    image = columns.image_among(names, where, IMAGE_COLUMNS)
    caption = columns.caption_among(names, where)
    types = arrow.types
    for name in (image, caption):
        if names.count(name) > 1:
            raise FileError(f"{where} has several columns {name!r}; rename all but one")
        kind = schema.field(name).type
        if types.is_dictionary(kind):
            raise FileError(
                f"{where}: column {name!r} is of type {kind}, and dictionaries are not read; write"
                f" it as {kind.value_type}"
            )
    kind = schema.field(image).type
    fields = {field.name: field.type for field in kind} if types.is_struct(kind) else {}
    content = fields.get("bytes", kind)
    binary = types.is_binary, types.is_large_binary, types.is_binary_view
    if not any(test(content) for test in binary):
        raise FileError(
            f"{where}: column {image!r} is of type {kind}, which is no picture's bytes; name"
            " another with --image_column"
        )
    kind = schema.field(caption).type
    if not any(
        test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view)
    ):
        raise FileError(
            f"{where}: column {caption!r} is of type {kind}, which is no text; name another with"
            " --caption_column"
        )
    return image, caption


def as_bytes(captions: "pyarrow.Array", arrow: Any) -> "pyarrow.Array":
    """Text as its bytes, not copied: offsets and encoding are still to be checked."""
    for test, kind in (("is_large_string", "large_binary"), ("is_string_view", "binary_view")):
        if getattr(arrow.types, test)(captions.type):
            return captions.view(getattr(arrow, kind)())
    return captions.view(arrow.binary())
