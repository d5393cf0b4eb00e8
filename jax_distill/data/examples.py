"""Reads the rows of batches: from any source of a mixture, damaged or not, into arrays."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jax_distill.data.arrays import Arrays, Pool
from jax_distill.data.damaged import Replaced, first_good, key_of
from jax_distill.data.mixture import Mixture, Start, is_dropped
from jax_distill.flow import Batch
from jax_distill.storage.files import FileError


class Rows(NamedTuple):
    """The rows of a batch, and the damaged examples that others stand in for."""

    batch: Batch
    replaced: list[Replaced]


class Examples:
    """Reads the rows of batches that this process holds; several threads may.

    A source has examples by index. One that has `fill` as well writes them into rows itself, see
    `EmbeddedLatents`.

    Args:
      mixture: of sources.
      seed: of the order and of what is dropped.
      held: the examples of a batch that are read, by their places in it.
      rows: for each row, which of those it is.
      caption_dropout: the share of examples that are given with the empty caption.
      damaged_share: the largest share of a source's examples that may be replaced because they are
        damaged; see `_read`. All that are met are counted in `damaged.Damages`.
    """

    def __init__(
        self,
        mixture: Mixture,
        seed: int,
        held: np.ndarray,
        rows: np.ndarray,
        caption_dropout: float = 0.0,
        damaged_share: float = 0.0,
    ):
        self._mixture, self._orders = mixture, mixture.orders(seed)
        self._seed, self._held, self._rows = seed, held, rows
        self._dropout, self._damaged_share = caption_dropout, damaged_share
        self._empty = mixture.empty if caption_dropout else None
        self._pools: dict[int, Pool] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For workers, which have memory of their own."""
        return {**self.__dict__, "_pools": {}}

    def __call__(self, start: Start) -> Rows:
        """The batch that begins there."""
        arrays, replaced = None, []
        for row, place in enumerate(self._held):
            arrays = self._read(start, int(place), row, arrays, replaced)
        if np.array_equal(self._rows, np.arange(len(self._held))):
            return Rows(arrays.batch, replaced)
        return Rows(jax.tree.map(lambda leaf: leaf[self._rows], arrays.batch), replaced)

    def _read(
        self, start: Start, place: int, row: int, arrays: Arrays | None, replaced: list[Replaced]
    ) -> Arrays:
        """Reads one example of a batch into a row; makes the arrays for the first one.

        In the place of a damaged one, which is added to `replaced`, stands the next good one of its
        source's epoch. Other places of the stream stay as they are, on every process.

        Raises:
          FileError: it is damaged, as are more after it than may be.
          PassingError: it cannot be read for now.
        """
        order = self._orders[start.size]
        found = order[start.within + place]
        source = self._mixture.parts[found.part].source
        dropped = is_dropped(self._seed, start.position + place, self._dropout)

        def read(later: int) -> Arrays:
            index = order.index(found, later)
            return self._write(arrays, row, start.size, found.part, index, dropped)

        def told(later: int, error: FileError) -> None:
            index = order.index(found, later)
            replaced.append(Replaced(found.part, index, key_of(source, index), str(error)))

        return first_good(read, len(source), self._damaged_share, told)

    def _write(
        self, arrays: Arrays | None, row: int, size: int, part: int, index: int, dropped: bool
    ) -> Arrays:
        """Writes an example into a row, with the empty caption if its own is dropped."""
        source = self._mixture.parts[part].source
        fills = hasattr(source, "fill")
        example = source.like if fills else source[index]
        if arrays is None:
            if size not in self._pools:
                self._pools.setdefault(size, Pool(example, len(self._held)))
            arrays = self._pools[size].take()
        last, arrays.written[row] = arrays.written[row], None
        if fills:
            held = last[1] if last is not None and last[0] == part else None
            arrays.written[row] = part, source.fill(arrays.batch, row, index, held, dropped)
            return arrays
        if dropped:
            example = example._replace(text=self._empty)
        jax.tree.map(lambda leaf, value: np.copyto(leaf[row, ...], value), arrays.batch, example)
        return arrays
