"""Damaged examples: the next good ones in their place, up to a share of their source's.

Readers tell of each that they pass over, along with the batch. They are counted where batches are
taken, so that threads and worker processes of one process have one count.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from absl import logging
from ml_collections import ConfigDict

from jax_distill.data.mixture import Part
from jax_distill.storage.files import FileError, PassingError

T = TypeVar("T")


class Replaced(NamedTuple):
    """A damaged example that another one stands in for.

    Attributes:
      part: the number of its source in `Mixture.parts`.
      index: in the source.
      key: of the example; "" where it cannot be read either.
      reason: a sentence that names the file.
    """

    part: int
    index: int
    key: str
    reason: str

    def __str__(self) -> str:
        key = f" ({self.key!r:.200})" * bool(self.key)
        return f"example {self.index}{key}"


class Lost(NamedTuple):
    """Examples that lie in a file that is missing or damaged as a whole."""

    examples: range
    reason: str


def share_of(settings: ConfigDict) -> float:
    """The largest share of a folder's examples that a run passes over.

    Args:
      settings: the run's section `data`.
    """
    return settings.damaged_share if settings.damaged == "skip" else 0.0


def first_good(
    read: Callable[[int], T],
    count: int,
    share: float,
    told: Callable[[int, FileError], None] = lambda later, error: None,
) -> T:
    """What `read` gives for the first of 0, 1, .. that is not damaged.

    Args:
      read: raises `FileError` for a damaged example.
      count: of the source's examples.
      share: of them that may be damaged; with 0 the first one has to be good.
      told: is called for each that is passed over.

    Raises:
      FileError: more in a row are damaged than may be.
      PassingError: one cannot be read for now.
    """
    for later in range(min(int(share * count) + 1, count)):
        try:
            return read(later)
        except PassingError:
            raise
        except FileError as error:
            last = error
            told(later, error)
    raise too_many(last, share) from None


def good(source: Sequence[T], index: int, share: float) -> T:
    """An example of a source; in the place of a damaged one, where some may be, the next good one.

    Args:
      source: random-access.
      index: of the example.
      share: of its examples that may be damaged.

    Raises:
      FileError: as `first_good`.
    """
    count = len(source)
    return first_good(lambda later: source[(index + later) % count], count, share)


def too_many(error: FileError | str, share: float) -> FileError:
    """The error of a damaged example where no more may be."""
    return FileError(f"{error}{f'; data.damaged_share={share:g} allows no more' * (share > 0)}")


def check_lost(lost: Sequence[Lost], count: int, share: float) -> None:
    """Raises FileError if more of a folder's examples are lost than may be."""
    if sum(len(each.examples) for each in lost) > share * count:
        raise too_many(lost[0].reason, share)


class Damages:
    """Counts the damaged examples of each source, those of lost files from the beginning.

    Args:
      parts: the sources; `lost` of one that has it is a list of `Lost`.
      share: of a source's examples that may be damaged.

    Raises:
      FileError: more are lost than may be.
    """

    def __init__(self, parts: Sequence[Part], share: float):
        self._parts, self._share = parts, share
        self._met: list[set[int]] = [set() for _ in parts]
        for part, met in zip(parts, self._met):
            lost: Sequence[Lost] = getattr(part.source, "lost", ())
            check_lost(lost, len(part.source), share)
            for each in lost:
                met.update(each.examples)
                known = f"{len(met)} of {len(part.source)}"
                first, last = each.examples[0], each.examples[-1]
                words = "examples %d to %d are replaced by others (%s so far): %s"
                logging.warning(words, first, last, known, each.reason)

    def add(self, replaced: Sequence[Replaced]) -> None:
        """Counts those that were passed over for a batch; a warning names each once.

        Raises:
          FileError: there are too many.
        """
        for one in replaced:
            met, count = self._met[one.part], len(self._parts[one.part].source)
            if one.index in met:
                continue
            met.add(one.index)
            if len(met) > self._share * count:
                raise too_many(one.reason, self._share)
            known = f"{len(met)} of {count}"
            logging.warning(
                "%s is replaced by the next one (%s so far): %s", one, known, one.reason
            )


def key_of(source: Any, index: int) -> str:
    """The key of an example that cannot be read; "" where it is not known."""
    return source.key(index) if hasattr(source, "key") else ""
