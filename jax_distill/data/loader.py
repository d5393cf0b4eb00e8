"""Input pipelines: a random-access source, shuffled and repeated by grain, in batches."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np

from jax_distill.data.encoding import NULL_CAPTION
from jax_distill.data.records import LatentRecords
from jax_distill.flow import Batch, Text


class EmbeddedLatents:
    """Latents with captions embedded when they were prepared: those of FLUX's world."""

    embedder = None

    def __init__(self, records: LatentRecords):
        self._records = records
        self.null = records.null

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Batch:
        record = self._records[int(index)]
        return Batch(record.latents.astype(np.float32), Text(record.sequence, record.pooled))

    def captions(self, indices: Sequence[int]) -> tuple[list[str], Text]:
        """The captions of some examples, as words and embedded (B, ...)."""
        records = [self._records[index] for index in indices]
        text = Text(*(np.stack([getattr(r, name) for r in records]) for name in Text._fields))
        return [record.caption for record in records], text


class TokenizedLatents:
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
        self._records, self._tokenize, self._read = records, tokenize, read

    def __getstate__(self) -> dict[str, Any]:
        """For the workers of a loader, which embed nothing."""
        kept = {name: self.__dict__[name] for name in ("_records", "_tokenize")}
        return {**kept, "_read": None}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Batch:
        record = self._records[int(index)]
        tokens = jax.tree.map(lambda ids: ids[0], self._tokenize([record.caption]))
        return Batch(record.latents.astype(np.float32), tokens)

    @functools.cached_property
    def embedder(self) -> Any:
        return self._read()

    @functools.cached_property
    def null(self) -> Text:
        """The empty caption, embedded once, with a leading axis of length one."""
        return self.embedder.gathered(self._tokenize([NULL_CAPTION]))

    def captions(self, indices: Sequence[int]) -> tuple[list[str], Text]:
        """The captions of some examples, as words and embedded (B, ...)."""
        captions = [self._records[index].caption for index in indices]
        return captions, self.embedder.gathered(self._tokenize(captions))


def example_of_row(batch_size: int, accumulate: int, rows_per_example: int) -> np.ndarray:
    """The index of the example that each row of a batch holds, (batch_size,) from 0 on.

    A micro-batch is every `accumulate`-th row, see `training/step.py`. In it, `rows_per_example`
    successive rows hold the same example; micro-batches hold different ones.
    """
    rows = np.arange(batch_size)
    return rows // (accumulate * rows_per_example) * accumulate + rows % accumulate


class Batches:
    """An endless stream of batches that counts the examples it has given.

    Args:
      read: makes the batch that begins at a given position of the stream of examples.
      count: of examples in a batch.
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
        """The position, JSON-able; examples read ahead do not count."""
        return {"examples": self._taken}

    def go_back(self, count: int) -> bool:
        """Goes back by so many batches of this size; False where there were fewer."""
        start = self._taken - count * self._count
        if start < 0:
            return False
        self.set_state({"examples": start})
        return True

    def set_state(self, position: dict[str, int]) -> None:
        """Continues from the position of a stream, whatever the size of its batches."""
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

    The order of examples depends on (source, seed) alone, and the position is the number given:
    batches of any size go through the same examples. Neither depends on the number of processes
    that read, or on their rows.

    Args:
      source: random-access, of `Batch` without the leading axis.
      batch_size: of all processes together.
      seed: of the shuffle, which differs from epoch to epoch.
      rows: of each batch, to be read here, see `sharding.local_rows`; all by default.
      layout: index of the example in each row, see `example_of_row`; by default each row has its
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
