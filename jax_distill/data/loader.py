"""Input pipelines: a random-access source, shuffled and repeated by grain, in batches."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from jax_distill.data.damaged import Damages, Lost
from jax_distill.data.encoding import NULL_CAPTION
from jax_distill.data.examples import Examples, Rows
from jax_distill.data.mixture import Course, Mixture, Part, Sizes, Start
from jax_distill.data.records import LatentRecords
from jax_distill.flow import Batch, Text
from jax_distill.storage.files import FileError


class Ahead(NamedTuple):
    """How batches are read while a step runs; the batches are the same, whatever it is.

    Attributes:
      threads: that read, a batch each.
      kept: batches at most that wait to be taken.
      workers: processes that read in the place of this one's threads; 0: none. Their batches are
        copied once more, so they pay where examples are computed in Python.
    """

    threads: int = 1
    kept: int = 2
    workers: int = 0


ONE_THREAD = Ahead()


def first_of(batch: Any) -> Any:
    """The first row of arrays, without their leading axis."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], batch)


class OfRecords:
    """The part of a source that is the same for all that read a folder of records."""

    def __init__(self, records: LatentRecords):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @property
    def lost(self) -> Sequence[Lost]:
        """Examples of shards that are missing or damaged as a whole."""
        return self._records.lost

    def key(self, index: int) -> str:
        """See `LatentRecords.key`."""
        return self._records.key(index)


class EmbeddedLatents(OfRecords):
    """Latents with captions embedded when they were prepared: those of FLUX's world."""

    embedder = None

    def __init__(self, records: LatentRecords):
        super().__init__(records)
        self.null = records.null

    def __getitem__(self, index: int) -> Batch:
        record = self._records[int(index)]
        return Batch(record.latents.astype(np.float32), Text(record.sequence, record.pooled))

    @functools.cached_property
    def like(self) -> Batch:
        """An example of zeros."""
        return Batch(np.zeros(self._records.latents_shape, np.float32), self.empty)

    def fill(self, batch: Batch, row: int, index: int, held: int | None, dropped: bool) -> int:
        """Writes an example into a row of a batch, and of its caption what the row lacks.

        Args:
          batch: of arrays as of `like`, with a leading axis.
          row: of the batch.
          index: of the example.
          held: how many tokens of a caption the row held last, the others being padding; None if
            that is not known.
          dropped: whether it is given with the empty caption.

        Returns:
          How many tokens of a caption it holds now.
        """
        text = Text(batch.text.sequence[row], batch.text.pooled[row])
        return self._records.fill(index, batch.x[row], text, held, bare=dropped)

    def captions(self, indices: Sequence[int]) -> tuple[list[str], Text]:
        """The captions of some examples, as words and embedded (B, ...).

        In the place of a damaged one, where some may be, stands that of the next good one.
        """
        records = [self._records.good(index) for index in indices]
        text = Text(*(np.stack([getattr(r, name) for r in records]) for name in Text._fields))
        return [record.caption for record in records], text

    @functools.cached_property
    def empty(self) -> Text:
        return first_of(self.null)


class TokenizedLatents(OfRecords):
    """Latents with captions as token ids, which `embedder` embeds on the devices of the run.

    Text encoders are read where something is first embedded: by all processes at the same time.

    Args:
      records: with captions, embedded or not.
      tokenize: captions (B,) to token ids, arrays (B, ..).
      read: reads the text encoders, see `training.feed.Embedder`; their `gathered` gives `Text` of
        any number of captions in host memory.
    """

    def __init__(
        self,
        records: LatentRecords,
        tokenize: Callable[[Sequence[str]], Any],
        read: Callable[[], Any],
    ):
        super().__init__(records)
        self._tokenize, self._read = tokenize, read

    def __getstate__(self) -> dict[str, Any]:
        """For the workers of a loader, which embed nothing."""
        kept = {name: self.__dict__[name] for name in ("_records", "_tokenize")}
        return {**kept, "_read": None}

    def __getitem__(self, index: int) -> Batch:
        record = self._records[int(index)]
        tokens = first_of(self._tokenize([record.caption]))
        return Batch(record.latents.astype(np.float32), tokens)

    @functools.cached_property
    def embedder(self) -> Any:
        return self._read()

    @functools.cached_property
    def null(self) -> Text:
        """The empty caption, embedded once, with a leading axis of length one."""
        return self.embedder.gathered(self._tokenize([NULL_CAPTION]))

    @functools.cached_property
    def empty(self) -> Any:
        return first_of(self._tokenize([NULL_CAPTION]))

    def captions(self, indices: Sequence[int]) -> tuple[list[str], Text]:
        """As those of `EmbeddedLatents`."""
        captions = [self._records.good(index).caption for index in indices]
        return captions, self.embedder.gathered(self._tokenize(captions))


def example_of_row(batch_size: int, accumulate: int, rows_per_example: int) -> np.ndarray:
    """The index of the example that each row of a batch holds, (batch_size,) from 0 on.

    A micro-batch is every `accumulate`-th row, see `training/step.py`. In it, `rows_per_example`
    successive rows hold the same example; micro-batches hold different ones.
    """
    rows = np.arange(batch_size)
    return rows // (accumulate * rows_per_example) * accumulate + rows % accumulate


class Batches:
    """An endless stream of batches that knows its position.

    Attributes:
      size: of the pictures in the batch that was given last, a number in `Mixture.resolutions`.

    Args:
      read: makes the batch that begins at a given place.
      damages: of the sources.
      count: of examples in a batch.
      sizes: which size each batch has; by default there is one.
      ahead: how batches are read ahead.
    """

    def __init__(
        self,
        read: Callable[[Start], Rows],
        damages: Damages,
        count: int,
        sizes: Sizes | None = None,
        ahead: Ahead = ONE_THREAD,
    ):
        self._read, self._count, self._reading = read, count, ahead
        self._damages = damages
        self._sizes = Sizes([1], 0) if sizes is None else sizes
        self.size = 0
        self.set_state({"examples": 0})

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        batch, replaced = next(self._ahead)
        try:
            self._damages.add(replaced)
        except FileError:
            self._ahead.close()  # worker processes, which would complain at the end of this one
            raise
        self.size = self._course.start(self._taken).size
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able; examples read ahead do not count. See `Course`."""
        return self._course.position(self._taken)

    def go_back(self, count: int) -> bool:
        """Goes back by so many batches of this length; False where there were fewer."""
        position = self._course.position(self._taken - count)
        numbers = [position["examples"], *position.get("of_sizes", ()), position.get("batches", 0)]
        if min(numbers) < 0:
            return False
        self.set_state(position)
        return True

    def set_state(self, position: dict[str, Any]) -> None:
        """Continues from the position of a stream, whatever the size of its batches."""
        self._taken = 0
        self._course = course = Course(self._sizes, self._count, position)
        numbers = grain.MapDataset.range((sys.maxsize - position["examples"]) // self._count)
        dataset = numbers.map(Read(self._read, course))
        threads, kept, workers = self._reading
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(kept, threads))
        dataset = dataset.to_iter_dataset(options)
        if workers:
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        self._ahead = iter(dataset)


class Read(NamedTuple):
    """A function from the number of a batch to its rows; workers are sent it."""

    read: Callable[[Start], Rows]
    course: Course

    def __call__(self, number: int) -> Rows:
        return self.read(self.course.start(int(number)))


def batches(
    source: Any,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    layout: Sequence[int] | None = None,
    *,
    caption_dropout: float = 0.0,
    damaged_share: float = 0.0,
    ahead: Ahead = ONE_THREAD,
) -> Batches:
    """An endless stream of shuffled batches whose position can be saved and restored.

    The order of examples depends on (source, seed) alone, and the position is the number given:
    batches of any size go through the same examples. Neither depends on the number of processes
    that read, or on their rows.

    Args:
      source: random-access, of `Batch` without the leading axis; or a `Mixture` of such.
      batch_size: of all processes together.
      seed: of the shuffle, which differs from epoch to epoch.
      rows: of each batch, to be read here, see `sharding.local_rows`; all by default.
      layout: index of the example in each row, see `example_of_row`; by default each row has its
        own. An example is read once, by the processes that have rows of it.
      caption_dropout: the share of examples that are given with the empty caption, whichever
        process reads them.
      damaged_share: see `Examples`; 0 lets the first damaged example end the stream.
      ahead: how batches are read ahead.

    Raises:
      ValueError: see `check_batch_size` and `Damages`.
    """
    mixture = source if isinstance(source, Mixture) else Mixture([Part(source)])
    layout = np.arange(batch_size) if layout is None else np.asarray(layout)
    count = int(layout.max()) + 1
    check_batch_size(batch_size, mixture.smallest(), rows_per_example=batch_size // count)
    held, places = np.unique(layout if rows is None else layout[rows], return_inverse=True)
    read = Examples(mixture, seed, held, places, caption_dropout, damaged_share)
    damages = Damages(mixture.parts, damaged_share)
    return Batches(read, damages, count, mixture.sizes(seed), ahead)


def check_batch_size(
    batch_size: int, examples: int, key: str = "batch_size", rows_per_example: int = 1
) -> None:
    """Raises ValueError if a batch is larger than the data."""
    if batch_size > rows_per_example * examples:
        times = f"{rows_per_example} times " * (rows_per_example > 1)
        raise ValueError(
            f"{key}: {batch_size} is more than {times}the {examples} examples there are; lower it"
            " or raise data.examples"
        )
