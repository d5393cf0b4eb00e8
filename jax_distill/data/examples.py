"""Reads the rows of batches: from any source of a mixture, damaged or not, into arrays."""

from typing import Any

import jax
import numpy as np
from absl import logging

from jax_distill.data.arrays import Arrays, Pool
from jax_distill.data.mixture import Mixture, Start, is_dropped
from jax_distill.flow import Batch
from jax_distill.storage.files import FileError, PassingError


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
        damaged; see `_read`.
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
        self._damaged: dict[int, set[int]] = {}
        self._pools: dict[int, Pool] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For workers, which have memory of their own."""
        return {**self.__dict__, "_pools": {}}

    def __call__(self, start: Start) -> Batch:
        """The batch that begins there."""
        arrays = None
        for row, place in enumerate(self._held):
            arrays = self._read(start, int(place), row, arrays)
        if np.array_equal(self._rows, np.arange(len(self._held))):
            return arrays.batch
        return jax.tree.map(lambda leaf: leaf[self._rows], arrays.batch)

    def _read(self, start: Start, place: int, row: int, arrays: Arrays | None) -> Arrays:
        """Reads one example of a batch into a row; makes the arrays for the first one.

        In the place of a damaged one, which a warning names once, stands the next good one of its
        source's epoch. Other places of the stream stay as they are, on every process.

        Raises:
          FileError: it is damaged, as are more than may be.
          PassingError: it cannot be read for now.
        """
        order = self._orders[start.size]
        found = order[start.within + place]
        source = self._mixture.parts[found.part].source
        for later in range(len(source)):
            index = order.index(found, later)
            try:
                dropped = is_dropped(self._seed, start.position + place, self._dropout)
                return self._write(arrays, row, start.size, found.part, index, dropped)
            except PassingError:
                raise
            except FileError as error:
                self._note(found.part, index, error)
        raise AssertionError("all examples of a source are damaged, and none was too many")

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

    def _note(self, part: int, index: int, error: FileError) -> None:
        """Counts a damaged example; raises its error if there are too many."""
        damaged = self._damaged.setdefault(part, set())
        new = index not in damaged
        damaged.add(index)
        count = len(self._mixture.parts[part].source)
        if len(damaged) > self._damaged_share * count:
            limit = f"; data.damaged_share={self._damaged_share:g} allows no more"
            raise FileError(f"{error}{limit * (self._damaged_share > 0)}") from None
        if new:
            known = f"{len(damaged)} of {count}"
            logging.warning("replaced by the next one (%s so far): %s", known, error)
