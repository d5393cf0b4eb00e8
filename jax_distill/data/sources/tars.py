"""WebDataset's tars: members that share a name up to its first dot are one example."""

import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from absl import logging

from jax_distill.data import pictures
from jax_distill.data.pictures import Encoded
from jax_distill.data.sources.source import (
    USUAL,
    Captioned,
    Columns,
    check_caption,
    check_keys,
    plain_caption,
)
from jax_distill.storage import disks
from jax_distill.storage.files import (
    TEXT_BYTES,
    FileError,
    check_regular,
    decode_text,
    named,
    parse_json,
    unread,
)

_BLOCK = tarfile.BLOCKSIZE
_MOST_END = 2**20  # zeros that end a tar: two blocks, padded to a record
_FIX = "restore it or pack it again"


class _Member(NamedTuple):
    name: str
    offset: int  # of its content in the tar
    size: int


class _Example(NamedTuple):
    tar: Path
    key: str
    members: Mapping[str, _Member]  # by the ending: what comes after the first dot of the name


class Tars:
    """Captioned pictures in tars: `cat.png` and its caption, `cat.txt` or in `cat.json`.

    Their headers are read once; after that, access is random. Members without a picture beside
    them, and hidden ones, are left out and counted in the log. A key is the tar's name and what the
    members' names have in common.

    Args:
      paths: of the tars, in order.
      columns: `image` is the ending of pictures where examples have several, such as "orig.png";
        `caption` the field of the JSON, by default "text" or "caption". A `.txt` comes first,
        unless that field is given.

    Raises:
      FileError: a tar is cut short or damaged, or members cannot be used.
    """

    has_pictures = True

    def __init__(self, paths: Sequence[Path], columns: Columns = USUAL):
        self.name = " and ".join(f"'{path}'" for path in paths[:2])
        self.name += f" and {len(paths) - 2} more" * (len(paths) > 2)
        self._columns = columns
        self._examples: list[_Example] = []
        for path in paths:
            found = _examples(path)
            with_picture = [example for example in found if self._endings(example)]
            if others := [example for example in found if not self._endings(example)]:
                name = next(iter(others[0].members.values())).name
                logging.warning(
                    "'%s': %d keys are left out: they have no picture, such as '%s'",
                    *(path, len(others), name),
                )
            self._examples += with_picture
        if not self._examples:
            ending = f"*.{columns.image}" if columns.image else ", ".join(pictures.endings())
            raise FileError(f"{self.name} has no pictures ({ending})")
        check_keys([self.key(index) for index in range(len(self))], self.name)

    def _endings(self, example: _Example) -> list[str]:
        """The endings of its pictures."""
        if self._columns.image:
            return [self._columns.image] if self._columns.image in example.members else []
        return [ending for ending in example.members if f".{ending}".lower() in _ENDINGS]

    def __len__(self) -> int:
        return len(self._examples)

    def key(self, index: int) -> str:
        return f"{self._examples[index].tar.name}/{self._examples[index].key}"

    def __getitem__(self, index: int) -> Captioned:
        example = self._examples[index]
        endings = self._endings(example)
        if len(endings) > 1:
            raise FileError(
                f"{_where(example.tar, example.key)} has several pictures ({', '.join(endings)});"
                " name the ending of one with --image_column"
            )
        member = example.members[endings[0]]
        content = _content(example.tar, member, pictures.FILE_BYTES)
        picture = Encoded(content, _where(example.tar, member.name))
        return Captioned(self.key(index), self._caption(example), picture)

    def _caption(self, example: _Example) -> str:
        text, table = (example.members.get(ending) for ending in ("txt", "json"))
        if text and not self._columns.caption:
            where = _where(example.tar, text.name)
            return plain_caption(decode_text(_text(example.tar, text), where), where)
        if table is None:
            ending = "json" if self._columns.caption else "txt"
            raise FileError(
                f"{_where(example.tar, example.key)} has no caption; pack it beside the picture, as"
                f" '{example.key}.{ending}'"
            )
        where, fix = _where(example.tar, table.name), "mend it and pack the tar again"
        content = decode_text(_text(example.tar, table), where)
        fields = parse_json(content, dict, where=where, fix=fix)
        caption = fields[self._columns.caption_among(fields, where)]
        if not isinstance(caption, str):
            raise FileError(f"{where}: the caption is {caption!r:.80}, which is no text; {fix}")
        check_caption(caption, where)
        return caption


def _where(tar: Path, name: str) -> str:
    return f"'{tar}', {name!r:.200}"


_ENDINGS = frozenset(pictures.endings())


def _examples(path: Path) -> list[_Example]:
    """The examples of a tar in order, those without a picture too."""
    found: dict[str, dict[str, _Member]] = defaultdict(dict)
    hidden: list[str] = []
    for member in _members(path):
        name = PurePosixPath(member.name)
        if name.name.startswith(".") or "__MACOSX" in name.parts:
            hidden.append(member.name)
            continue
        stem, _, ending = name.name.partition(".")
        members = found[str(name.with_name(stem))]
        if ending in members:
            raise FileError(f"'{path}': two members have the name {member.name!r:.200}; {_FIX}")
        members[ending] = member
    if hidden:
        logging.warning(
            "'%s': %d members are left out: hidden, or of another system, such as '%s'",
            *(path, len(hidden), hidden[0]),
        )
    return [_Example(path, key, members) for key, members in found.items()]


def _members(path: Path) -> Iterator[_Member]:
    """The files of a tar, by its headers alone.

    Raises:
      FileError: it is cut short or damaged, or has something else, such as a link.
    """
    check_regular(path)
    with named(path), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not member.isdir():
                        yield _checked(member, path, size)
                end = tar.offset
        except FileError:
            raise
        except Exception as error:  # of damaged headers, nearly every kind
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise unread(f"'{path}'", error, disks.raised) or FileError(
                f"'{path}' cannot be read as a tar ({reason}); {_FIX}"
            ) from None
        file.seek(end)
        rest = file.read(_MOST_END)
        if len(rest) < _BLOCK or any(rest) or file.read(1):
            raise FileError(
                f"'{path}' is cut short or damaged: after {end} bytes comes neither a member nor"
                f" the end of a tar; {_FIX}"
            )


def _checked(member: tarfile.TarInfo, path: Path, size: int) -> _Member:
    name = member.name
    where = _where(path, name)
    if member.islnk() or member.issym():
        raise FileError(f"{where} is a link; pack the file itself (tar --dereference)")
    if not member.isreg() or member.issparse():
        raise FileError(f"{where} is no regular file; pack the tar without it")
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        raise FileError(f"{where} leads out of the tar; pack it under a name without '..' or '/'")
    if member.size < 0 or member.offset_data + member.size > size:
        raise FileError(f"'{path}' is cut short within {name!r:.200}; {_FIX}")
    return _Member(name, member.offset_data, member.size)


def _content(path: Path, member: _Member, most: int) -> bytes:
    """The content of a member; one byte more than `most` where it is longer."""
    wanted = min(member.size, most + 1)
    try:
        with path.open("rb") as file:
            file.seek(member.offset)
            content = file.read(wanted)
    except FileNotFoundError:
        raise FileError(f"'{path}' is missing; {_FIX}") from None
    except (OSError, MemoryError) as error:
        raise unread(f"'{path}'", error, disks.raised) or error from None
    if len(content) < wanted:
        raise FileError(f"'{path}' is cut short within {member.name!r:.200}; {_FIX}")
    return content


def _text(path: Path, member: _Member) -> bytes:
    if member.size > TEXT_BYTES:
        raise FileError(
            f"{_where(path, member.name)} is longer than the {TEXT_BYTES >> 20} MiB that are read"
            " of text; shorten it"
        )
    return _content(path, member, TEXT_BYTES)
