"""The interface of sources of captioned pictures, and the names of their columns."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from jax_distill.data.pictures import Encoded
from jax_distill.storage.files import FileError

CAPTION_CHARACTERS = 2**16


class Captioned(NamedTuple):
    """One example of a source."""

    key: str  # unique in its source, and always the same
    caption: str
    picture: Encoded | None  # None in a source of captions alone


class CaptionedSource(Protocol):
    """Captioned pictures by random access, in the source's own order; can be pickled.

    Attributes:
      name: of the source in messages, such as "'photos'".
      has_pictures: whether there are pictures; otherwise, captions alone.
    """

    name: str
    has_pictures: bool

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The key of an example, which may itself be damaged."""

    def __getitem__(self, index: int) -> Captioned:
        """Reads one example, whose picture is not decoded; several threads may.

        Raises:
          IndexError: there is no such example; negative indices are none.
          FileError: it has no picture or no caption that can be used.
          PassingError: it cannot be read for now.
        """


class Columns(NamedTuple):
    """Names of the columns that hold pictures and captions; None for a kind's usual names."""

    image: str | None = None
    caption: str | None = None

    def image_among(self, names: Collection[str], where: str, usual: Sequence[str]) -> str:
        """The column of pictures; as `caption_among`."""
        return _among(names, where, "image_column", self.image, usual)

    def caption_among(self, names: Collection[str], where: str) -> str:
        """The column of captions.

        Args:
          names: of the columns that there are.
          where: the place, which begins the message.

        Raises:
          FileError: none of them has the name that was given, or a usual one.
        """
        return _among(names, where, "caption_column", self.caption, CAPTION_COLUMNS)


USUAL = Columns()
CAPTION_COLUMNS = ("text", "caption")


def _among(
    names: Collection[str], where: str, flag: str, given: str | None, usual: Sequence[str]
) -> str:
    wanted = [given] if given else usual
    for name in wanted:
        if name in names:
            return name
    raise FileError(
        f"{where} has no column {' or '.join(map(repr, wanted))} (it has:"
        f" {', '.join(map(str, names)) or 'none'}); name one of them with --{flag}"
    )


def check_unread(columns: Columns, where: str) -> None:
    """Checks that no column is named for a source that has none.

    Args:
      columns: as they were given.
      where: begins the message.

    Raises:
      FileError: one is.
    """
    for flag, name in (("image_column", columns.image), ("caption_column", columns.caption)):
        if name:
            raise FileError(f"{where} has no columns, and --{flag} names {name!r}; leave that out")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or holds what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def endings_told(endings: Mapping[str, int]) -> str:
    """The most frequent endings of files, for a message; '' if there are none.

    Args:
      endings: how often there is each.
    """
    named = sorted((-count, ending) for ending, count in endings.items() if ending)
    return ", ".join(ending for _, ending in named[:5]) + ", .." * (len(named) > 5)


def check_inside(name: str, where: str) -> PurePosixPath:
    """Checks that the name of a picture leads to a file below the folder it is given in.

    Raises:
      FileError: it is empty, or leads out of the folder.
    """
    path = PurePosixPath(name)
    if not path.parts:
        raise FileError(f"{where}: file_name is empty; name a picture or remove the line")
    if path.is_absolute() or ".." in path.parts:
        raise FileError(f"{where}: {name!r:.200} leads out of the folder; move the picture into it")
    return path


def check_index(index: int, count: int) -> None:
    """Raises IndexError unless an example of so many has that index; none counts from the end."""
    if not 0 <= index < count:
        raise IndexError(f"there is no example {index} of {count}")


def check_keys(keys: Iterable[str], name: str, what: str = "examples have the key") -> None:
    """Checks that all keys differ.

    Args:
      keys: of examples, or what makes them.
      name: of the source.
      what: comes after "two" in the message, and before the key.

    Raises:
      FileError: two are equal.
    """
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise FileError(f"{name}: two {what} {key!r:.200}; rename one of them")
        seen.add(key)


def plain_caption(text: str, where: str) -> str:
    """Strips a caption of the blanks around it, and ends the lines inside it with LF.

    Args:
      text: as read from a file.
      where: as in `check_caption`.

    Raises:
      FileError: as `check_caption`; or CR inside, perhaps between several captions.
    """
    caption = text.replace("\r\n", "\n").strip()
    if "\r" in caption:
        raise FileError(f"{where}: the caption has CR inside; end lines with LF or CR LF")
    check_caption(caption, where)
    return caption


def check_caption(caption: str, where: str) -> None:
    """Checks that an encoder can read a caption.

    Args:
      caption: of a picture, or to be drawn.
      where: its place, which begins the message.

    Raises:
      FileError: it is empty, too long, or has NUL characters.
    """
    if not caption.strip():
        raise FileError(f"{where}: the caption is empty; write one or take its picture away")
    if "\0" in caption:
        raise FileError(f"{where}: the caption has NUL characters; remove them")
    if len(caption) > CAPTION_CHARACTERS:
        raise FileError(
            f"{where}: the caption has {len(caption)} characters, more than {CAPTION_CHARACTERS};"
            " shorten it"
        )
