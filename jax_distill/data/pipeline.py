"""Input pipelines: a random-access source, shuffled, repeated and batched by grain."""

from collections.abc import Sequence

import grain
import jax
import numpy as np

from jax_distill.data import shapes
from jax_distill.data.captions import CaptionEncoder
from jax_distill.data.records import LatentRecords
from jax_distill.flow import Text
from jax_distill.objectives.objective import Batch


class Pictures:
    """Pictures of the shapes world, rendered when asked for: (64, 64, 3) float32 in [-1, 1]."""

    def __init__(self, examples: int, seed: int):
        self._examples, self._seed = examples, seed

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Batch:
        image = shapes.sample(self._seed, int(index)).image
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


def batches(
    source, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """An endless stream of shuffled batches whose position can be saved and restored.

    Position and order depend on (source, batch size, seed) alone; how many processes read, and
    which rows, makes no difference to either.

    Args:
      source: random-access, of `Batch` without the leading axis.
      batch_size: of all processes together.
      seed: of the shuffle, which differs from epoch to epoch.
      rows: those of each batch that are read here, see `parallel.local_rows`; all by default.

    Raises:
      ValueError: see `check_batch_size`.
    """
    check_batch_size(batch_size, len(source))
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    indices = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()

    def read(batch: np.ndarray) -> Batch:
        examples = [source[index] for index in batch[rows]]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)

    dataset = indices.batch(batch_size, drop_remainder=True).map(read)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(dataset.to_iter_dataset(options))


def check_batch_size(batch_size: int, examples: int, key: str = "batch_size") -> None:
    """Raises ValueError if a batch is larger than the data."""
    if batch_size > examples:
        raise ValueError(
            f"{key}: {batch_size} is more than the {examples} examples there are; lower it or raise"
            " data.examples"
        )
