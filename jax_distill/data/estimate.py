"""Estimates what making a data set takes, by making a little of it; nothing is written."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_distill.data.encoding import EMBEDDED_BATCH, Work, distinct, embedded_half
from jax_distill.data.making import duration
from jax_distill.flow import Text

LOOKED_AT, WORDS = 64, 1000
"""Examples that are looked at, and captions that are read, their pictures with them."""


class Estimate(NamedTuple):
    """What a data set takes.

    Attributes:
      examples: how many there are, damaged ones among them.
      captions: how many differ; all are counted where there are at most `WORDS`.
      latent_bytes, caption_bytes: of each kind.
      seconds: by what takes them, on this process' devices alone.
      damaged: of the first `LOOKED_AT`, how many.
    """

    examples: int
    captions: int
    latent_bytes: int
    caption_bytes: int
    seconds: dict[str, float]
    damaged: int

    def lines(self, processes: int = 1) -> list[str]:
        """For people, a line for each fact.

        Args:
          processes: that would share the work.
        """
        looked_at, about = min(self.examples, LOOKED_AT), "about " * (self.examples > WORDS)
        damaged = f" ({self.damaged} of the first {looked_at} are damaged)" * (self.damaged > 0)
        times = [f"{what} {duration(s / processes)}" for what, s in self.seconds.items()]
        whole = duration(sum(self.seconds.values()) / processes)
        return [
            f"examples: {self.examples}{damaged}",
            f"distinct captions: {about}{self.captions}",
            f"bytes: {_bytes(self.latent_bytes)} of latents, {_bytes(self.caption_bytes)} of"
            " captions",
            f"time: about {whole} ({', '.join(times)})",
        ]


def estimate(work: Work) -> Estimate:
    """Looks at a few examples, encodes two batches, and counts the captions of more.

    Args:
      work: what is to be made.

    Raises:
      ValueError: as `encoding.make`, of what it looks at.
    """
    seconds = {}
    begun = time.monotonic()
    found = work.look(most=LOOKED_AT)
    looked_at = min(work.count, LOOKED_AT)
    seconds["checking"] = (time.monotonic() - begun) / looked_at * work.count
    words = work.words(WORDS)
    captions = distinct(words)[1]
    count = round(len(captions) * work.count / len(words)) if work.count > WORDS else len(captions)
    size = sum(len(caption.encode()) for caption in captions) / len(captions)
    texts: Callable[[range], Text] | None = None
    if work.text is not None:
        read = work.text.read()

        def texts(span: range) -> Text:
            starts = range(span.start, span.stop, EMBEDDED_BATCH)
            parts = [
                embedded_half(
                    read, [found.captions[i] for i in span if start <= i][:EMBEDDED_BATCH]
                )
                for start in starts
            ]
            return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

        first = range(min(EMBEDDED_BATCH, len(found.captions)))
        seconds["captions"] = _second_time(texts, first) / EMBEDDED_BATCH * count
        size += _text_bytes(work, captions)
    encode = work.begin(found, texts)
    span = range(min(work.batch, len(found.captions)))
    each = _second_time(encode, span) / work.batch / work.workers
    seconds["latents"] = each * work.count
    latents = 2 * int(np.prod(work.facts["latents"]["shape"]))
    damaged = len(found.damaged)
    return Estimate(work.count, count, latents * work.count, int(size * count), seconds, damaged)


def _text_bytes(work: Work, captions: list[str]) -> float:
    """Bytes of an embedded caption, on average."""
    (length, width), pooled = work.text.facts["sequence"], work.text.facts["pooled"]
    rows = length
    if work.text.facts["padding"] == "shared":
        rows = float(np.mean(work.text.rows(captions)))
    return 2 * (rows * width + pooled)


def _second_time(act: Callable[[range], Any], span: range) -> float:
    """Seconds that it takes once it is compiled."""
    act(span)
    begun = time.monotonic()
    act(span)
    return time.monotonic() - begun


def _bytes(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
