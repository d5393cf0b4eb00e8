"""Pictures and captions to a folder of latents, so that training never encodes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jax_distill import streams
from jax_distill.data import folder, records
from jax_distill.flow import Text
from jax_distill.worlds.shapes import renderer

BATCH = 64
DRAWN_BATCH = 240  # captions that are embedded, then drawn, at a time
EMBEDDED_BATCH = 8  # pictures and captions at a time, through large networks
NULL_CAPTION = " "  # what T2I-Distill (arXiv:2512.13006) drops captions to


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
            batch = [renderer.sample(seed, start + i) for i in range(count)]
            images = np.stack([example.image for example in batch])
            padded = np.pad(images, ((0, BATCH - count), (0, 0), (0, 0), (0, 0)))
            names = [f"picture {start + i} of the shapes world" for i in range(count)]
            latents = _stored(encode(padded), names)
            for example, latent in zip(batch, latents):
                yield records.LatentRecord(latent, example.caption)
            if start // BATCH % 100 == 99:
                rate = (start + count) / (time.monotonic() - begun)
                logging.info("encoded %d of %d pictures, %.0f/s", start + count, examples, rate)

    description = {"world": "shapes", "examples": examples, "seed": seed}
    records.write(path, encoded(), description)


def encode_drawn(
    path: Path,
    captions: Sequence[str],
    embed: Callable[[Sequence[str]], Text],
    draw: Callable[[Text, int], Any],
    description: dict,
    *,
    null: Text | None = None,
) -> None:
    """Latents that a teacher draws from noise, for captions alone: no picture is needed.

    The end points of its trajectories are data as good as the teacher is, for any objective, as
    TBCM (arXiv:2511.20410) trains on latents along them.

    Args:
      path: folder of the records.
      captions: one an example.
      embed: captions (B,) to their embeddings.
      draw: embedded captions (`DRAWN_BATCH`, ..) and the index of the first, of which its noise is
        to depend, to packed latents (`DRAWN_BATCH`, N, C).
      description: what is worth knowing of the teacher.
      null: the empty caption, embedded; with it embedded captions are stored.
    """
    begun = time.monotonic()

    def encoded():
        for start in range(0, len(captions), DRAWN_BATCH):
            batch = captions[start : start + DRAWN_BATCH]
            text = embed([*batch, *batch[:1] * (DRAWN_BATCH - len(batch))])
            latents = _stored(
                draw(text, start), [f"the drawing of {words!r:.80}" for words in batch]
            )
            stored = _half(text, batch) if null is not None else ()
            for caption, *fields in zip(batch, latents, *stored):
                yield records.LatentRecord(fields[0], caption, *fields[1:])
            rate = (start + len(batch)) / (time.monotonic() - begun)
            logging.info("drew %d of %d, %.0f/s", start + len(batch), len(captions), rate)

    null = None if null is None else _half(null, [NULL_CAPTION])
    records.write(path, encoded(), {**description, "examples": len(captions)}, null=null)


def encode_folder(
    path: Path,
    pictures: Sequence[folder.Captioned],
    resolution: tuple[int, int],
    encode: Callable[..., Any],
    embed: Callable[[Sequence[str]], Text],
    *,
    seed: int | None = None,
) -> None:
    """Encodes pictures and embeds their captions into `path`.

    Embedded captions are stored, 2 MiB each in FLUX's size: training then holds no text encoder,
    which would take as much memory as half the transformer, and does nothing but read.

    Args:
      path: folder of the records.
      pictures: with their captions.
      resolution: height and width in pixels that pictures are fitted to.
      encode: pictures (B, H, W, 3) uint8, `key=` optional, to packed latents (B, N, C).
      embed: captions (B,) to their embeddings.
      seed: of latents that are drawn from the autoencoder's posterior; None takes its mean.

    Raises:
      ValueError: a file is no picture, or its latents are not finite.
    """

    def encoded():
        for start in range(0, len(pictures), EMBEDDED_BATCH):
            batch = pictures[start : start + EMBEDDED_BATCH]
            rows = [*batch, *batch[:1] * (EMBEDDED_BATCH - len(batch))]  # one shape compiles
            read = {row.path: folder.read(row.path, *resolution) for row in batch}
            images = np.stack([read[row.path] for row in rows])
            key = None if seed is None else jax.random.fold_in(streams.key(seed), start)
            latents = _stored(encode(images, key=key), [f"'{row.path}'" for row in batch])
            text = _half(embed([row.caption for row in rows]), [row.caption for row in batch])
            for row, *fields in zip(batch, latents, *text):
                yield records.LatentRecord(fields[0], row.caption, *fields[1:])
            logging.info("encoded %d of %d pictures", start + len(batch), len(pictures))

    description = {"world": "flux", "examples": len(pictures), "resolution": list(resolution)}
    empty = embed([NULL_CAPTION] * EMBEDDED_BATCH)
    null = _half(jax.tree.map(lambda leaf: leaf[:1], empty), [NULL_CAPTION])
    records.write(path, encoded(), description, null=null)


def _stored(latents: Any, names: Sequence[str]) -> np.ndarray:
    """Latents as they are stored, in float16: the first of a batch, one a name.

    Raises:
      ValueError: some are not finite, as they are or in float16.
    """
    with np.errstate(over="ignore"):
        stored = np.asarray(latents, np.float16)[: len(names)]
    _check_finite(stored, names, "latents")
    return stored


def _half(text: Text, captions: Sequence[str]) -> Text:
    """Embedded captions as they are stored, in bfloat16.

    Raises:
      ValueError: some of `captions`, the first of a batch, are not finite.
    """
    half = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), text)
    for leaf in half:
        _check_finite(leaf[: len(captions)], [f"caption {c!r:.80}" for c in captions], "embeddings")
    return half


def _check_finite(values: np.ndarray, names: Sequence[str], what: str) -> None:
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        raise ValueError(
            f"{names[int(np.argmin(finite))]} has {what} that are not finite in {values.dtype};"
            " check the weights that make them"
        )
