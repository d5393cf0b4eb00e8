"""Latents that a teacher draws for captions, as a data set: no picture is needed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jax_distill.data.encoding import Embed, Listed, StoredText, stored_latents
from jax_distill.data.making import Encode
from jax_distill.devices.processes import ALONE
from jax_distill.flow import Text

DRAWN_BATCH = 240  # captions that a teacher draws for at a time


@dataclass(frozen=True)
class DrawnLatents:
    """The work of latents that a teacher draws from noise for captions: no picture is needed.

    The end points of its trajectories are data as good as the teacher, for any objective; TBCM
    (arXiv:2511.20410) trains on latents along them. Where captions are stored embedded, the teacher
    draws from what is stored, which is what a student will be given.

    Attributes:
      keys: one an example.
      captions: likewise.
      read: reads the teacher; returns the function that draws: embedded captions
        (`DRAWN_BATCH`, ..) and the index of the first, from which it draws the noise, to packed
        latents (`DRAWN_BATCH`, N, C).
      embed: embeds captions (B,) that are not stored embedded.
      text: how those that are stored are embedded.
      facts: about the teacher.
    """

    keys: Sequence[str]
    captions: Sequence[str]
    read: Callable[[], Callable[[Text, int], Any]]
    embed: Embed
    text: StoredText | None
    facts: Mapping[str, Any]
    workers: int = field(default=1, init=False)

    @property
    def count(self) -> int:
        return len(self.captions)

    @property
    def batch(self) -> int:
        return DRAWN_BATCH

    def look(self, *, most=None, journal=None, share=ALONE) -> Listed:
        del journal, share
        return Listed(self.captions[:most])

    def words(self, most: int) -> Sequence[str]:
        return self.captions[:most]

    def begin(self, found: Listed, texts: Callable[[range], Text]) -> Encode:
        draw = self.read()

        def encode(span: range) -> list[dict[str, Any]]:
            captions = [found.captions[index] for index in span]
            text = self.embed(captions) if self.text is None else texts(span)
            rows = np.minimum(np.arange(self.batch), len(span) - 1)  # one shape compiles
            filled = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32)[rows], text)
            names = [f"the drawing of {words!r:.80}" for words in captions]
            stored = stored_latents(draw(filled, span[0]), names)
            return [{"key": self.keys[i], "latents": one} for i, one in zip(span, stored)]

        return encode
