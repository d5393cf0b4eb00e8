"""Several folders of examples as one stream: shares by weight, and sizes of pictures by turns.

All of it is a pure function of (sources, weights, seed) and a position, so that a stream goes on
from a few numbers, on any number of processes. grain shuffles each source. Its own mixture is not
used: it rounds weights (of 0.7 and 0.3 it is six examples off after 20,000) and holds no share of
three or more sources to within one.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import numpy as np

from jax_distill.flow import Text

MOST_PARTS = 10_000
"""The length of a round of turns; weights are kept to so many parts of their sum."""

_SIZES, _DROPPED = range(2)  # what is drawn from a seed, apart from the shuffles
_APART = 0x9E3779B9  # between the seeds of two sources: 2^32 by the golden ratio


class Part(NamedTuple):
    """A source of examples and its share.

    Attributes:
      source: random-access, see `worlds.Source`.
      weight: positive; shares are by weight.
      resolution: height and width of its pictures in pixels; None where all sources are alike.
    """

    source: Any
    weight: float = 1.0
    resolution: tuple[int, ...] | None = None


class Mixture:
    """Sources by weight, in groups of one size of pictures.

    Attributes:
      parts: the sources.
      resolutions: the sizes, in the order in which the sources have them first.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)
        self.resolutions = tuple(dict.fromkeys(part.resolution for part in parts))
        self._groups = [
            [number for number, part in enumerate(parts) if part.resolution == resolution]
            for resolution in self.resolutions
        ]
        rounds([part.weight for part in parts])  # of two folders, 0 to 1 would be none

    @property
    def first(self) -> Any:
        """The first source, whose pictures have the run's own size."""
        return self.parts[0].source

    @property
    def null(self) -> Text:
        """The empty caption, with a leading axis of length one."""
        return self.first.null

    @property
    def empty(self) -> Any:
        """The empty caption as examples have theirs."""
        return self.first.empty

    @property
    def embedder(self) -> Any:
        """See `worlds.Source`."""
        return self.first.embedder

    def __len__(self) -> int:
        """The number of examples in all sources together."""
        return sum(len(part.source) for part in self.parts)

    def smallest(self) -> int:
        """The number of examples in the size that has the fewest."""
        return min(sum(len(self.parts[i].source) for i in group) for group in self._groups)

    def orders(self, seed: int) -> list["Order"]:
        """The order of the examples of each size."""
        return [Order(self.parts, group, seed) for group in self._groups]

    def sizes(self, seed: int) -> "Sizes":
        """Which size each batch has."""
        weights = [sum(Fraction(str(self.parts[i].weight)) for i in x) for x in self._groups]
        return Sizes(rounds(weights), seed)


class Place(NamedTuple):
    """Where an example lies.

    Attributes:
      part: the number of its source in `Mixture.parts`.
      number: in the source's own endless stream, from 0.
    """

    part: int
    number: int


class Order:
    """The endless order of the examples of one size.

    After any number of examples, each source has given its share to within one; of two sources, in
    any window too. Each is shuffled by seed and epoch on its own: every example comes once before
    one comes twice.
    """

    def __init__(self, parts: Sequence[Part], group: Sequence[int], seed: int):
        self._group = group
        shares = rounds([parts[number].weight for number in group])
        self._turns = turns(shares)
        self._shares = np.asarray(shares)
        self._before = np.zeros(len(self._turns), np.int64)  # turns that the same source had
        for source in range(len(group)):
            mine = self._turns == source
            self._before[mine] = np.arange(mine.sum())
        self._shuffled = [
            grain.MapDataset.range(len(parts[number].source))
            .shuffle(seed=(seed + _APART * number) % 2**32)
            .repeat()
            for number in group
        ]
        self._lengths = [len(parts[number].source) for number in group]

    def __getitem__(self, position: int) -> Place:
        """The example at a position, from 0."""
        past, turn = divmod(position, len(self._turns))
        source = self._turns[turn]
        number = past * int(self._shares[source]) + int(self._before[turn])
        return Place(self._group[source], number)

    def index(self, place: Place, later: int = 0) -> int:
        """The index of an example in its source; or of the one that comes so much later.

        That is one of the same epoch, which begins anew at its end.
        """
        source = self._group.index(place.part)
        epoch, within = divmod(place.number, self._lengths[source])
        length = self._lengths[source]
        return int(self._shuffled[source][epoch * length + (within + later) % length])


class Sizes:
    """Which size the pictures of a batch have: a function of the seed and the batch's number.

    In every round of batches each size has its share. The order within is drawn, since regular
    turns could fall in with those of the players of a method.
    """

    def __init__(self, shares: Sequence[int], seed: int):
        self._seed, self._shares = seed, np.asarray(shares)
        self._round = np.repeat(np.arange(len(shares)), shares)

    def __len__(self) -> int:
        """The number of sizes."""
        return len(self._shares)

    def at(self, number: int) -> tuple[int, np.ndarray]:
        """The size of batch `number`, from 0, and how many batches each size had before it."""
        past, turn = divmod(number, len(self._round))
        order = self._round
        if len(self) > 1:
            order = order[np.argsort(_drawn(_SIZES, self._seed, past, len(order)), kind="stable")]
        before = past * self._shares + np.bincount(order[:turn], minlength=len(self))
        return int(order[turn]), before


class Start(NamedTuple):
    """Where a batch begins.

    Attributes:
      size: of its pictures, a number in `Mixture.resolutions`.
      within: the position in the order of that size.
      position: examples of any size that were given before.
    """

    size: int
    within: int
    position: int


class Course:
    """Where each batch of a stream begins, from a position on.

    The position is a number of examples. With several sizes it also has the number of batches and
    the examples of each size, so that none is missed or given twice when batches change in length.

    Args:
      sizes: which size each batch has.
      count: of examples in a batch.
      position: as `position` gave it.
    """

    def __init__(self, sizes: Sizes, count: int, position: dict[str, Any]):
        self._sizes, self._count = sizes, count
        self._examples = int(position["examples"])
        self._batches = position.get("batches", 0)
        self._given = position.get("of_sizes", [self._examples])
        if not self._examples:
            self._given = [0] * len(sizes)
        if len(self._given) != len(sizes) or sum(self._given) != self._examples:
            raise ValueError(f"the position {position} is not one of data of {len(sizes)} sizes")
        self._before = sizes.at(self._batches)[1]

    def _counts(self, before: np.ndarray) -> list[int]:
        """How many examples each size has given, when it has had so many batches."""
        taken = before - self._before
        return [given + self._count * int(n) for given, n in zip(self._given, taken)]

    def start(self, taken: int) -> Start:
        """Where the batch after `taken` others begins."""
        if len(self._sizes) == 1:
            position = self._examples + taken * self._count
            return Start(0, position, position)
        size, before = self._sizes.at(self._batches + taken)
        return Start(size, self._counts(before)[size], self._examples + taken * self._count)

    def position(self, taken: int) -> dict[str, Any]:
        """The position, JSON-able, when `taken` batches were taken."""
        position: dict[str, Any] = {"examples": self._examples + taken * self._count}
        if len(self._sizes) > 1:
            number = self._batches + taken
            counts = self._counts(self._sizes.at(number)[1])
            position |= {"batches": number, "of_sizes": counts}
        return position


def rounds(weights: Sequence[float | Fraction]) -> list[int]:
    """Whole numbers in the ratio of weights, which are taken as they are written: 0.1 is a tenth.

    They add up to `MOST_PARTS` at most; where the exact ones do not, they are rounded.

    Raises:
      ValueError: a weight would be rounded to none.
    """
    exact = [x if isinstance(x, Fraction) else Fraction(str(x)) for x in weights]
    shares = [weight / sum(exact) for weight in exact]
    length = math.lcm(*(share.denominator for share in shares))
    if length <= MOST_PARTS:
        return [int(share * length) for share in shares]
    whole = [int(share * MOST_PARTS) for share in shares]
    rests = [n - share * MOST_PARTS for n, share in zip(whole, shares)]
    for number in sorted(range(len(whole)), key=rests.__getitem__)[: MOST_PARTS - sum(whole)]:
        whole[number] += 1
    if min(whole) == 0:
        raise ValueError(
            f"data.weights: {float(min(exact)):g} is less than a ten-thousandth of their sum; leave"
            " its folder out, or raise it"
        )
    return whole


def turns(shares: Sequence[int]) -> np.ndarray:
    """Whose turn it is, (sum(shares),), so that each source always has its share to within one.

    Of the sources whose next turn is due, the one whose is due soonest has it.

    Source: Baruah et al., Proportionate progress, Algorithmica 15 (1996): with one place a turn,
    earliest deadlines meet every window.
    """
    length = sum(shares)
    had = [0] * len(shares)
    order = np.empty(length, np.int64)
    for turn in range(length):
        due = (i for i, share in enumerate(shares) if had[i] * length < (turn + 1) * share)
        order[turn] = chosen = min(due, key=lambda i: -(-(had[i] + 1) * length // shares[i]))
        had[chosen] += 1
    return order


def is_dropped(seed: int, position: int, share: float) -> bool:
    """Whether the example at a position of the stream loses its caption, as a share of all do."""
    return share > 0 and int(_drawn(_DROPPED, seed, position, 1)[0]) < share * 2**64


def _drawn(what: int, seed: int, number: int, count: int) -> np.ndarray:
    """Uniform uint64, (count,): a function of the arguments on every machine and version."""
    return np.random.Philox(key=[what << 32 | seed, number]).random_raw(count)
