"""Data of the shapes world: rendered as it is read, or encoded once into records."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jax_distill.data import records
from jax_distill.data.encoding import stored_latents
from jax_distill.data.records import LatentRecords
from jax_distill.flow import Batch, Text
from jax_distill.worlds.shapes import renderer
from jax_distill.worlds.shapes.captions import CaptionEncoder

BATCH = 64


class Pictures:
    """Pictures rendered as they are read: (64, 64, 3) float32 in [-1, 1]."""

    def __init__(self, examples: int, seed: int):
        self._examples, self._seed = examples, seed

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Batch:
        image = renderer.sample(self._seed, int(index)).image
        return Batch(image.astype(np.float32) / 127.5 - 1)


class CaptionedLatents:
    """Latents with captions that are embedded as they are read."""

    embedder = None

    def __init__(self, records: LatentRecords, encoder: CaptionEncoder):
        self._records, self._encoder = records, encoder
        self.null = Text(*encoder.encode([""]))
        self.empty = Text(*(leaf[0] for leaf in self.null))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Batch:
        record = self._records[int(index)]
        try:
            sequence, pooled = self._encoder.encode([record.caption])
        except ValueError as error:
            raise ValueError(f"data.text_length, example {int(index)}: {error}") from None
        return Batch(record.latents.astype(np.float32), Text(sequence[0], pooled[0]))


def encode_shapes(
    path: Path, examples: int, seed: int, encode: Callable[[np.ndarray], Any]
) -> None:
    """Renders and encodes the first `examples` of the stream `seed` into `path`.

    Args:
      path: folder of the records.
      examples: number of pictures.
      seed: of the stream.
      encode: pictures (`BATCH`, H, W, 3) uint8 to packed latents (`BATCH`, N, C).
    """
    begun = time.monotonic()

    def encoded():
        for start in range(0, examples, BATCH):
            count = min(BATCH, examples - start)
            batch = [renderer.sample(seed, start + i) for i in range(count)]
            images = np.stack([example.image for example in batch])
            padded = np.pad(images, ((0, BATCH - count), (0, 0), (0, 0), (0, 0)))
            names = [f"picture {start + i} of the shapes world" for i in range(count)]
            latents = stored_latents(encode(padded), names)
            for example, latent in zip(batch, latents):
                yield records.LatentRecord(latent, example.caption)
            if start // BATCH % 100 == 99:
                rate = (start + count) / (time.monotonic() - begun)
                logging.info("encoded %d of %d pictures, %.0f/s", start + count, examples, rate)

    description = {"world": "shapes", "examples": examples, "seed": seed}
    records.write(path, encoded(), description)
