"""The batches of a run on its mesh, as losses take them."""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from jax.sharding import Mesh

from jax_distill.data.loader import Batches
from jax_distill.devices import sharding
from jax_distill.flow import Batch


class Embedder(Protocol):
    """Text encoders on the mesh of a run."""

    def together(self, batch_size: int) -> int:
        """Of how many batches the captions are embedded at a time."""

    def embed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches of token ids, split over the mesh, to batches of `Text`; it returns at once."""


class Feed:
    """A stream's batches, split over the mesh, captions that are token ids embedded there.

    With several batches embedded at a time, the first of them is that of a step whose number is a
    multiple of theirs, wherever a run goes on: it computes the same, to the bit. The next ones are
    read one a step.

    Attributes:
      size: of the pictures in the batch given last, see `Batches`.

    Args:
      stream: at the position that the run begins or goes on from.
      mesh: of the run.
      batch_size: of all processes together.
      taken: steps that the run has taken.
      embedder: None where captions come embedded.
    """

    def __init__(
        self,
        stream: Batches,
        mesh: Mesh,
        batch_size: int,
        taken: int = 0,
        embedder: Embedder | None = None,
    ):
        self._stream, self._mesh, self._embedder = stream, mesh, embedder
        self._together = embedder.together(batch_size) if embedder else 1
        # Batches, the sizes of their pictures, and the positions after them.
        self._read: list[tuple[Batch, int, Any]] = []
        self._ready: deque[tuple[Batch, int, Any]] = deque()
        self._position, self.size = stream.get_state(), 0
        before = taken % self._together
        if before and stream.go_back(before):
            for _ in range(before):
                next(self)

    def __next__(self) -> Batch:
        if not self._ready:
            while len(self._read) < self._together:
                self._read_one()
            batches, *others = zip(*self._read)
            if self._embedder is not None:
                batches = self._embedder.embed(batches)
            self._ready.extend(zip(batches, *others))
            self._read.clear()
        if self._together > 1:
            self._read_one()
        batch, self.size, self._position = self._ready.popleft()
        return batch

    def get_state(self) -> dict[str, int]:
        """The position in the stream after the batches given, see `Batches.get_state`."""
        return self._position

    def _read_one(self) -> None:
        batch = sharding.shard_batch(next(self._stream), self._mesh)
        self._read.append((batch, self._stream.size, self._stream.get_state()))
