"""Encodes pictures and captions into a folder of latents, so that training never encodes."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jax_distill import streams
from jax_distill.data import pictures, records
from jax_distill.data.sources.checking import CheckedSource
from jax_distill.flow import Text
from jax_distill.storage.files import write_atomically

DAMAGED = "damaged.jsonl"  # beside the records: keys of examples that were left out, and why
DRAWN_BATCH = 240  # captions embedded, then drawn, at a time
EMBEDDED_BATCH = 8  # pictures and captions at a time, through large networks
NULL_CAPTION = " "  # replaces dropped captions in T2I-Distill (arXiv:2512.13006)


def encode_drawn(
    path: Path,
    captions: Sequence[str],
    embed: Callable[[Sequence[str]], Text],
    draw: Callable[[Text, int], Any],
    description: dict,
    *,
    null: Text | None = None,
) -> None:
    """Writes latents that a teacher draws from noise for captions: no picture is needed.

    The end points of its trajectories are data as good as the teacher, for any objective; TBCM
    (arXiv:2511.20410) trains on latents along them.

    Args:
      path: folder of the records.
      captions: one an example.
      embed: captions (B,) to their embeddings.
      draw: embedded captions (`DRAWN_BATCH`, ..) and the index of the first, from which it draws
        the noise, to packed latents (`DRAWN_BATCH`, N, C).
      description: facts about the teacher.
      null: the empty caption, embedded; with it, embedded captions are stored.
    """
    begun = time.monotonic()

    def encoded():
        for start in range(0, len(captions), DRAWN_BATCH):
            batch = captions[start : start + DRAWN_BATCH]
            text = embed([*batch, *batch[:1] * (DRAWN_BATCH - len(batch))])
            latents = stored_latents(
                draw(text, start), [f"the drawing of {words!r:.80}" for words in batch]
            )
            stored = _half(text, batch) if null is not None else ()
            for caption, *fields in zip(batch, latents, *stored):
                yield records.LatentRecord(fields[0], caption, *fields[1:])
            rate = (start + len(batch)) / (time.monotonic() - begun)
            logging.info("drew %d of %d, %.0f/s", start + len(batch), len(captions), rate)

    null = None if null is None else _half(null, [NULL_CAPTION])
    records.write(path, encoded(), {**description, "examples": len(captions)}, null=null)


def encode_pictures(
    path: Path,
    source: CheckedSource,
    resolution: tuple[int, int],
    encode: Callable[..., Any],
    embed: Callable[[Sequence[str]], Text] | None,
    *,
    seed: int | None = None,
) -> None:
    """Encodes pictures and embeds their captions into `path`.

    Embedded captions are stored, 2 MiB each in FLUX's size, so that training only reads and holds
    no text encoder, which would take half as much memory as the transformer. Examples that were
    left out are listed in `DAMAGED` and counted in the description.

    Args:
      path: folder of the records.
      source: pictures with their captions.
      resolution: height and width in pixels to fit pictures to.
      encode: pictures (B, H, W, 3) uint8, `key=` optional, to packed latents (B, N, C).
      embed: captions (B,) to their embeddings; None stores them as words alone.
      seed: of latents drawn from the autoencoder's posterior; None takes its mean.

    Raises:
      ValueError: a file is not a picture, or its latents are not finite.
    """
    count = len(source)

    def encoded():
        for start in range(0, count, EMBEDDED_BATCH):
            batch = [source[i] for i in range(start, min(start + EMBEDDED_BATCH, count))]
            images = [pictures.read(row.picture, *resolution) for row in batch]
            captions = [row.caption for row in batch]
            padding = EMBEDDED_BATCH - len(batch)  # one shape compiles
            key = None if seed is None else jax.random.fold_in(streams.key(seed), start)
            latents = stored_latents(
                encode(np.stack([*images, *images[:1] * padding]), key=key),
                [row.picture.where for row in batch],
            )
            text = ()
            if embed is not None:
                text = _half(embed([*captions, *captions[:1] * padding]), captions)
            for row, *fields in zip(batch, latents, *text):
                yield records.LatentRecord(fields[0], row.caption, *fields[1:])
            logging.info("encoded %d of %d pictures", start + len(batch), count)

    description = {"world": "flux", "examples": count, "resolution": list(resolution)}
    if source.damaged:
        lines = (json.dumps(damaged._asdict()) + "\n" for damaged in source.damaged)
        write_atomically(path / DAMAGED, "".join(lines))
        description["damaged"] = len(source.damaged)
    null = None
    if embed is not None:
        empty = embed([NULL_CAPTION] * EMBEDDED_BATCH)
        null = _half(jax.tree.map(lambda leaf: leaf[:1], empty), [NULL_CAPTION])
    records.write(path, encoded(), description, null=null)


def stored_latents(latents: Any, names: Sequence[str]) -> np.ndarray:
    """Converts latents to float16, as they are stored: the first of a batch, one for each name.

    Raises:
      ValueError: some are not finite, before or after.
    """
    with np.errstate(over="ignore"):
        stored = np.asarray(latents, np.float16)[: len(names)]
    _check_finite(stored, names, "latents")
    return stored


def _half(text: Text, captions: Sequence[str]) -> Text:
    """Converts embedded captions to bfloat16, as they are stored.

    Raises:
      ValueError: some that belong to `captions`, the first of a batch, are not finite.
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
