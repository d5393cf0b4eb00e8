"""Pictures and captions to a folder of latents, so that training never encodes."""

import time
from pathlib import Path

import numpy as np
from absl import logging

from jax_distill.data import records, shapes
from jax_distill.models.latents import LatentCodec

BATCH = 64


def encode_shapes(path: Path, examples: int, seed: int, codec: LatentCodec) -> None:
    """Renders and encodes the first `examples` of the shapes world's stream `seed` into `path`."""
    begun = time.monotonic()

    def encoded():
        for start in range(0, examples, BATCH):
            count = min(BATCH, examples - start)
            batch = [shapes.sample(seed, start + i) for i in range(count)]
            images = np.stack([example.image for example in batch])
            padded = np.pad(images, ((0, BATCH - count), (0, 0), (0, 0), (0, 0)))
            latents = np.asarray(codec.encode(padded), np.float16)[:count]
            for example, latent in zip(batch, latents):
                yield records.LatentRecord(latent, example.caption)
            if start // BATCH % 100 == 99:
                rate = (start + count) / (time.monotonic() - begun)
                logging.info("encoded %d of %d pictures, %.0f/s", start + count, examples, rate)

    description = {"world": "shapes", "examples": examples, "seed": seed}
    records.write(path, encoded(), description)
