"""Reads every example of a source once, so that none of them fails hours later."""

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging

from jax_distill.data import pictures
from jax_distill.data.sources.source import Captioned, CaptionedSource, check_index
from jax_distill.storage.files import FileError, PassingError

CHECKS_LOGGED = 1000


class Damaged(NamedTuple):
    """An example that cannot be used."""

    key: str
    reason: str  # a sentence


class CheckedSource:
    """The examples of a source that can be used, in its order; a `CaptionedSource`."""

    has_pictures = True

    def __init__(self, source: CaptionedSource, indices: Sequence[int], damaged: list[Damaged]):
        self.name, self.damaged = source.name, damaged
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, index: int) -> str:
        check_index(index, len(self))
        return self._source.key(self._indices[index])

    def __getitem__(self, index: int) -> Captioned:
        check_index(index, len(self))
        return self._source[self._indices[index]]


def checked(
    source: CaptionedSource, resolution: tuple[int, int], *, damaged_share: float = 0.0
) -> CheckedSource:
    """Reads every caption and decodes every picture; the log counts what is done about them.

    Args:
      source: of captioned pictures.
      resolution: height and width that pictures will be fitted to; smaller ones are counted.
      damaged_share: the largest share of examples that may be left out because they are damaged.

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
    count = len(source)
    indices, damaged, damages = array("q"), [], 0
    notes, noted_first = Counter(), {}
    for index in range(count):
        try:
            picture = source[index].picture
            for note in pictures.check(picture, *resolution):
                notes[note] += 1
                noted_first.setdefault(note, picture.where)
            indices.append(index)
        except PassingError:
            raise
        except FileError as error:
            damages += 1
            if not damaged or damages <= damaged_share * count:  # no more are ever listed
                damaged.append(Damaged(source.key(index), str(error)))
        if (index + 1) % CHECKS_LOGGED == 0:
            logging.info("checked %d of %d pictures", index + 1, count)
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
    return CheckedSource(source, indices, damaged)
