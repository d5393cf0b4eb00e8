"""Input pipelines: a random-access source, shuffled and repeated by grain, in batches."""

import sys
from collections.abc import Callable, Sequence

import grain
import jax
import numpy as np

from jax_distill.data.records import LatentRecords
from jax_distill.flow import Batch, Text
from jax_distill.worlds.shapes import renderer
from jax_distill.worlds.shapes.captions import CaptionEncoder


class Pictures:
    """Pictures of the shapes world, rendered when asked for: (64, 64, 3) float32 in [-1, 1]."""

    def __init__(self, examples: int, seed: int):
        self._examples, self._seed = examples, seed

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Batch:
        image = renderer.sample(self._seed, int(index)).image
        return Batch(image.astype(np.float32) / 127.5 - 1)


class CaptionedLatents:
    """Latents and their captions, embedded as they are read: those of the shapes world."""

    def __init__(self, records: LatentRecords, encoder: CaptionEncoder):
        self._records, self._encoder = records, encoder
        self.null = Text(*encoder.encode([""]))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Batch:
        record = self._records[int(index)]
        try:
            sequence, pooled = self._encoder.encode([record.caption])
        except ValueError as error:
            raise ValueError(f"data.text_length, example {int(index)}: {error}") from None
        return Batch(record.latents.astype(np.float32), Text(sequence[0], pooled[0]))


class EmbeddedLatents:
    """Latents and their captions, embedded when they were prepared: those of FLUX's world."""

    def __init__(self, records: LatentRecords):
        self._records = records
        self.null = records.null

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Batch:
        record = self._records[int(index)]
        return Batch(record.latents.astype(np.float32), Text(record.sequence, record.pooled))

    def captions(self, indices: Sequence[int]) -> tuple[list[str], Text]:
        """Captions of some examples, as words and embedded (B, ...)."""
        records = [self._records[index] for index in indices]
        text = Text(*(np.stack([getattr(r, name) for r in records]) for name in Text._fields))
        return [record.caption for record in records], text


def example_of_row(batch_size: int, accumulate: int, rows_per_example: int) -> np.ndarray:
    """Which example of a batch each of its rows holds, (batch_size,) from 0 on.

    Of a micro-batch, every `accumulate`-th row as `step.make_step` takes them, `rows_per_example`
    rows in turn hold the same one; micro-batches hold different ones.
    """
    rows = np.arange(batch_size)
    return rows // (accumulate * rows_per_example) * accumulate + rows % accumulate


class Batches:
    """An endless stream of batches that knows how many examples it has given.

    Args:
      read: makes a batch of the examples that begin at a place of the stream of examples.
      count: examples a batch.
    """

    def __init__(self, read: Callable[[int], Batch], count: int):
        self._read, self._count = read, count
        self.set_state({"examples": 0})

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        batch = next(self._ahead)
        self._taken += self._count
        return batch

    def get_state(self) -> dict[str, int]:
        """The position, JSON-able; what is read ahead does not count."""
        return {"examples": self._taken}

    def set_state(self, position: dict[str, int]) -> None:
        """Goes on where a stream was, whatever the size of its batches."""
        start = self._taken = position["examples"]
        numbers = grain.MapDataset.range((sys.maxsize - start) // self._count)
        dataset = numbers.map(lambda number: self._read(start + number * self._count))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        self._ahead = iter(dataset.to_iter_dataset(options))


def batches(
    source,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    layout: Sequence[int] | None = None,
) -> Batches:
    """An endless stream of shuffled batches whose position can be saved and restored.

    The order of examples depends on (source, seed) alone, and the position is how many were given:
    batches of any size go through the same ones. How many processes read, and which rows, makes no
    difference to either.

    Args:
      source: random-access, of `Batch` without the leading axis.
      batch_size: of all processes together.
      seed: of the shuffle, which differs from epoch to epoch.
      rows: those of each batch that are read here, see `parallel.local_rows`; all by default.
      layout: which example each row of a batch holds, see `example_of_row`; by default each its
        own. An example is read once, by the processes that have rows of it.

    Raises:
      ValueError: see `check_batch_size`.
    """
    layout = np.arange(batch_size) if layout is None else np.asarray(layout)
    count = int(layout.max()) + 1
    check_batch_size(batch_size, len(source), rows_per_example=batch_size // count)
    held, places = np.unique(layout if rows is None else layout[rows], return_inverse=True)
    indices = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()

    def read(start: int) -> Batch:
        examples = [source[indices[start + int(place)]] for place in held]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *[examples[i] for i in places])

    return Batches(read, count)


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
