"""Pictures and captions to a folder of latents, so that training never encodes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jax_distill.data import records, shapes

BATCH = 64


def encode_shapes(
    path: Path, examples: int, seed: int, encode: Callable[[np.ndarray], Any]
) -> None:
    """Renders and encodes the first `examples` of the shapes world's stream `seed` into `path`.

    Args:
      path: folder of the records.
      examples: how many.
      seed: of the stream.
      encode: pictures (`BATCH`, H, W, 3) uint8 to packed latents (`BATCH`, N, C).
    """
    begun = time.monotonic()

    def encoded():
        for start in range(0, examples, BATCH):
            count = min(BATCH, examples - start)
            batch = [shapes.sample(seed, start + i) for i in range(count)]
            images = np.stack([example.image for example in batch])
            padded = np.pad(images, ((0, BATCH - count), (0, 0), (0, 0), (0, 0)))
            latents = np.asarray(encode(padded), np.float16)[:count]
            for example, latent in zip(batch, latents):
                yield records.LatentRecord(latent, example.caption)
            if start // BATCH % 100 == 99:
                rate = (start + count) / (time.monotonic() - begun)
                logging.info("encoded %d of %d pictures, %.0f/s", start + count, examples, rate)

    description = {"world": "shapes", "examples": examples, "seed": seed}
    records.write(path, encoded(), description)
