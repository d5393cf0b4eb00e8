"""WebDataset's tars: members that share a name up to its first dot are one example."""

import bisect
import itertools
import tarfile
from array import array
from collections import Counter, defaultdict
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
    check_index,
    check_keys,
    endings_told,
    is_hidden,
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
# Zeros end a tar: two blocks, padded to a record. More of them are a part that was never written.
_MOST_END = 2 * _BLOCK + tarfile.RECORDSIZE
_FIX = "restore it or pack it again"


class _Member(NamedTuple):
    name: str
    offset: int  # of its content in the tar
    size: int


class _Example(NamedTuple):
    tar: Path
    key: str
    members: Mapping[str, _Member]  # by the ending: what comes after the first dot of the name


class _Headers(NamedTuple):
    """The examples of a tar, in little memory."""

    tar: Path
    keys: list[str]
    endings: list[tuple[str, ...]]  # of each example's members; equal ones are one object
    starts: array  # of each example, and the end: numbers of members
    offsets: array  # of each member
    sizes: array


class Tars:
    """Captioned pictures in tars: `cat.png` and its caption, `cat.txt` or in `cat.json`.

    Their headers are read once; after that, access is random. Endings may be of either case.
    Members without a picture beside them, and hidden ones, are left out and counted in the log. A
    key is the tar's name and what the members' names have in common.

    Args:
      paths: of the tars, in order.
      columns: `image` is the ending of pictures where examples have several, such as "orig.png";
        `caption` the field of the JSON, by default "text" or "caption". A `.txt` comes first,
        unless that field is given.

    Raises:
      FileError: a tar is cut short or damaged, or has no pictures.
    """

    has_pictures = True

    def __init__(self, paths: Sequence[Path], columns: Columns = USUAL):
        self.name = " and ".join(f"'{path}'" for path in paths[:2])
        self.name += f" and {len(paths) - 2} more" * (len(paths) > 2)
        image = columns.image and columns.image.removeprefix(".").lower()
        self._columns = columns._replace(image=image)
        endings: Counter[str] = Counter()
        self._tars = [_packed(path, self._with_pictures(path, endings)) for path in paths]
        self._ends = list(itertools.accumulate(len(headers.keys) for headers in self._tars))
        wanted = not image or image in endings
        if not len(self) or not wanted:
            others = endings_told(endings)
            raise FileError(
                f"{self.name} has no pictures"
                f" ({f'*.{image}' if image else ', '.join(pictures.endings())})"
                + f", but members that end in {others}" * bool(others)
                + "; pack some, or name their ending with --image_column"
            )
        times = Counter(headers.tar.name for headers in self._tars)
        again = [headers for headers in self._tars if times[headers.tar.name] > 1]
        keys = (f"{headers.tar.name}/{key}" for headers in again for key in headers.keys)
        check_keys(keys, self.name)

    def _with_pictures(self, path: Path, endings: Counter[str]) -> Iterator[_Example]:
        """The examples of a tar that have pictures; counts endings of all members."""
        lacking, first = 0, ""
        for example in _examples(path):
            endings.update(list(example.members))
            # Beside others that have the wanted one, an example of another picture is damaged.
            if self._endings(example) or (self._columns.image and _any_picture(example)):
                yield example
                continue
            lacking += 1
            first = first or next(iter(example.members.values())).name
        if lacking:
            what = "keys are left out: they have no picture, such as"
            logging.warning("'%s': %d %s '%s'", path, lacking, what, first)

    def _endings(self, example: _Example) -> list[str]:
        """The endings of its pictures."""
        if self._columns.image:
            return [self._columns.image] if self._columns.image in example.members else []
        return [ending for ending in example.members if f".{ending}" in _ENDINGS]

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[_Headers, int]:
        """The tar that has an example, and its number there."""
        check_index(index, len(self))
        place = bisect.bisect_right(self._ends, index)
        headers = self._tars[place]
        return headers, index - (self._ends[place] - len(headers.keys))

    def key(self, index: int) -> str:
        headers, number = self._place(index)
        return f"{headers.tar.name}/{headers.keys[number]}"

    def __getitem__(self, index: int) -> Captioned:
        example = _unpacked(*self._place(index))
        endings = self._endings(example)
        if not endings:
            raise FileError(
                f"{_where(example.tar, example.key)} has no picture that ends in"
                f" {self._columns.image} (it has: {', '.join(example.members)}); {_FIX}"
            )
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


def _any_picture(example: _Example) -> bool:
    """Whether a member ends as pictures do, whatever is before that, as in "orig.png"."""
    return any(PurePosixPath(f"x.{ending}").suffix in _ENDINGS for ending in example.members)


def _examples(path: Path) -> list[_Example]:
    """The examples of a tar in order, those without a picture too."""
    by_key: dict[str, dict[str, _Member]] = defaultdict(dict)
    hidden: list[str] = []
    for member in _members(path):
        name = PurePosixPath(member.name)
        if is_hidden(name.name) or "__MACOSX" in name.parts:
            hidden.append(member.name)
            continue
        stem, _, ending = name.name.partition(".")
        members = by_key[str(name.with_name(stem))]
        if other := members.get(ending.lower()):
            raise FileError(
                f"'{path}': {other.name!r:.200} and {member.name!r:.200} are two members of one"
                f" name; {_FIX}"
            )
        members[ending.lower()] = member
    if hidden:
        logging.warning(
            "'%s': %d members are left out: hidden, or of another system, such as '%s'",
            *(path, len(hidden), hidden[0]),
        )
    return [_Example(path, key, members) for key, members in by_key.items()]


def _packed(path: Path, examples: Iterator[_Example]) -> _Headers:
    headers = _Headers(path, [], [], array("q", [0]), array("q"), array("q"))
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    for example in examples:
        # As they are written: the name of a member is its key and its ending.
        endings = tuple(member.name.rpartition("/")[2] for member in example.members.values())
        endings = tuple(name.partition(".")[2] for name in endings)
        headers.keys.append(example.key)
        headers.endings.append(known.setdefault(endings, endings))
        for member in example.members.values():
            headers.offsets.append(member.offset)
            headers.sizes.append(member.size)
        headers.starts.append(len(headers.offsets))
    return headers


def _unpacked(headers: _Headers, number: int) -> _Example:
    key, members = headers.keys[number], {}
    for place, ending in enumerate(headers.endings[number], headers.starts[number]):
        name = f"{key}.{ending}" if ending else key
        members[ending.lower()] = _Member(name, headers.offsets[place], headers.sizes[place])
    return _Example(headers.tar, key, members)


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
