"""Reads every example of a source once, so that none of them fails hours later."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

from absl import logging

from jax_distill.data import pictures
from jax_distill.data.sources.source import Captioned, CaptionedSource, check_index
from jax_distill.devices.processes import ALONE, Share
from jax_distill.storage.files import FileError, PassingError, read_json_lines, write_atomically

CHECKS_LOGGED = 1000
_TOLD = ("key", "caption", "picture")
PART, MOST_PARTS = 1024, 256  # examples that are noted at a time, and at most how often


class Damaged(NamedTuple):
    """An example that cannot be used."""

    key: str
    reason: str  # a sentence


class Looked(TypedDict):
    """What was found of an example: a caption, or the damage."""

    key: str
    caption: NotRequired[str]
    picture: NotRequired[str]  # its digest
    damage: NotRequired[str]
    notes: NotRequired[list[str]]  # about its picture
    where: NotRequired[str]  # the picture is, if there are notes
    size: NotRequired[int]  # the number of the one that suits it best, unless that is 0


class CheckedSource:
    """The examples of a source that can be used, in its order; a `CaptionedSource`.

    Attributes:
      captions: of its examples, as they were when they were checked.
      damaged: the other examples.
      content: a digest of what the examples are: their keys, captions and pictures.

    Args:
      source: of all examples.
      indices: of those that can be used.
      captions: of those.
      pictures: their digests.
      damaged: the others.
      content: as above.
      sizes: the number of the size that suits each best, where there are several.
    """

    has_pictures = True

    def __init__(
        self,
        source: CaptionedSource,
        indices: Sequence[int],
        captions: Sequence[str],
        pictures: Sequence[int],
        damaged: Sequence[Damaged],
        content: str,
        sizes: Sequence[int] | None = None,
    ):
        self.name, self.captions, self.damaged = source.name, captions, damaged
        self.content = content
        self._source, self._indices, self._pictures = source, indices, pictures
        self._sizes = sizes

    def of_size(self, number: int, damaged: Sequence[Damaged]) -> "CheckedSource":
        """The examples that one of several sizes suits best, and damaged ones to list with them."""
        places = [place for place, size in enumerate(self._sizes) if size == number]
        indices = array("q", (self._indices[place] for place in places))
        captions = [self.captions[place] for place in places]
        images = array("Q", (self._pictures[place] for place in places))
        content = hashlib.sha256(f"{self.content} {number}".encode()).hexdigest()
        return CheckedSource(self._source, indices, captions, images, damaged, content)

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, index: int) -> str:
        check_index(index, len(self))
        return self._source.key(self._indices[index])

    def __getitem__(self, index: int) -> Captioned:
        """As a `CaptionedSource`.

        Raises:
          FileError: it has another caption or picture than when it was checked.
        """
        check_index(index, len(self))
        found = self._source[self._indices[index]]
        same = digest(found.picture) == self._pictures[index]
        if found.caption != self.captions[index] or not same:
            other = "caption" if same else "picture"
            raise FileError(
                f"{self.name}: {found.key!r:.200} has another {other} than when it was checked; put"
                " the old one back, or begin anew with another --output"
            )
        return found


def digest(picture: pictures.Encoded) -> int:
    """A number of 64 bits that tells a picture from others, however they lie."""
    return int.from_bytes(hashlib.sha256(picture.content).digest()[:8], "big")


def checked(
    source: CaptionedSource,
    resolution: tuple[int, int],
    others: Sequence[tuple[int, int]] = (),
    *,
    damaged_share: float = 0.0,
    most: int | None = None,
    journal: Path | None = None,
    share: Share = ALONE,
) -> CheckedSource:
    """Reads every caption and decodes every picture; the log counts what is done about them.

    Args:
      source: of captioned pictures.
      resolution: height and width that pictures will be fitted to; smaller ones are counted.
      others: more of them; each picture will be fitted to the one that suits it best.
      damaged_share: the largest share of examples that may be left out because they are damaged.
      most: the number of examples to look at, from the first on; by default, all.
      journal: a folder that keeps what was found, so that a process that comes later needs not
        look again.
      share: of this process; of several, each looks at a part and all return the same.

    Returns:
      The examples that can be used, and what is wrong with the others.

    Raises:
      FileError: the source has no pictures, or more examples cannot be used: the first is named,
        the others are counted.
      PassingError: an example cannot be read for now.
    """
    if not source.has_pictures:
        raise FileError(
            f"{source.name} has captions alone, and no pictures to encode; let a teacher draw for"
            " them with --teacher and --captions"
        )
    count = len(source) if most is None else min(most, len(source))
    sizes = (resolution, *others)
    if journal is None:
        found: Iterable[Looked] = _looked(source, sizes, range(count))
    else:
        found = _kept(source, sizes, count, journal, share)
    return _usable(source, found, count, damaged_share)


def _looked(
    source: CaptionedSource, sizes: Sequence[tuple[int, int]], span: range
) -> Iterator[Looked]:
    """What is found of some examples."""
    for index in span:
        try:
            example = source[index]
            picture = pictures.shown(example.picture)
            size = pictures.nearest(picture, sizes)
            looked: Looked = {"key": example.key, "caption": example.caption}
            looked["picture"] = f"{digest(example.picture):016x}"
            if size:
                looked["size"] = size
            if notes := sorted(pictures.noted(picture, *sizes[size])):
                looked |= {"notes": notes, "where": example.picture.where}
        except PassingError:
            raise
        except FileError as error:
            looked = {"key": source.key(index), "damage": str(error)}
        yield looked
        if (index + 1) % CHECKS_LOGGED == 0:
            logging.info("checked %d of %d pictures", index + 1, len(source))


def _kept(
    source: CaptionedSource,
    sizes: Sequence[tuple[int, int]],
    count: int,
    journal: Path,
    share: Share,
) -> Iterator[Looked]:
    """As `_looked`, of all; by parts, each in a file of the journal once it is known."""
    size = max(PART, -(-count // MOST_PARTS))
    starts = range(0, count, size)
    paths = [journal / f"checked-{number:05d}.jsonl" for number in range(len(starts))]
    for number in range(len(starts))[share.index :: share.count]:
        if not paths[number].exists():
            span = range(starts[number], min(starts[number] + size, count))
            lines = [json.dumps(looked) + "\n" for looked in _looked(source, sizes, span)]
            write_atomically(paths[number], "".join(lines))
    share.wait(f"checked {journal}")
    for path in paths:
        for _, looked in read_json_lines(path, Looked):
            yield looked


def _usable(
    source: CaptionedSource, found: Iterable[Looked], count: int, damaged_share: float
) -> CheckedSource:
    """Takes the examples that can be used; see `checked`."""
    indices, captions, damaged, damages = array("q"), [], [], 0
    images, sizes, content = array("Q"), array("H"), hashlib.sha256()
    notes, noted_first = Counter(), {}
    for index, looked in enumerate(found):
        for note in looked.get("notes", ()):
            notes[note] += 1
            noted_first.setdefault(note, looked["where"])
        if "damage" not in looked:
            indices.append(index)
            captions.append(looked["caption"])
            images.append(int(looked["picture"], 16))
            sizes.append(looked.get("size", 0))
            content.update(json.dumps([looked[name] for name in _TOLD]).encode())
            continue
        damages += 1
        if not damaged or damages <= damaged_share * count:  # no more are ever listed
            damaged.append(Damaged(looked["key"], looked["damage"]))
    for note, times in sorted(notes.items()):
        where = noted_first[note]
        logging.warning("%d of %d pictures %s, such as %s", times, count, note, where)
    if damages > damaged_share * count or not indices:
        others = f" (and {damages - 1} more of {count} pictures)" * (damages > 1)
        limit = f"; --damaged_share={damaged_share:g} allows no more" * (damaged_share > 0)
        raise FileError(f"{damaged[0].reason}{others}{limit}")
    if damages:
        first = damaged[0].reason
        logging.warning("%d of %d pictures are left out: damaged: %s", damages, count, first)
    whole = content.hexdigest()
    return CheckedSource(source, indices, captions, images, damaged, whole, sizes)
