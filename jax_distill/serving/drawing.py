"""Draws what clients ask for, and times it."""

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jax_distill.evaluation.png import png
from jax_distill.flow import Text
from jax_distill.models.finite import NotFinite
from jax_distill.pipeline import Pipeline
from jax_distill.serving.parameters import Wanted, default_steps

CAPTIONS_KEPT = 32  # embedded ones; a few MB each in FLUX's world


class Refused(ValueError):
    """What is asked for cannot be drawn; the message says why."""


class Drawn(NamedTuple):
    """A picture.

    Attributes:
      png: the file.
      evaluations: of the network.
      milliseconds: from the embedded caption to the pixels, for the whole batch.
    """

    png: bytes
    evaluations: int
    milliseconds: float


class Studio:
    """Networks that draw, each picture as `sample` draws it; may be used by several threads.

    A picture of a batch of one goes through the very program that `sample` compiles for one
    picture. In larger batches numbers are rounded otherwise, so that a pixel may differ by a grey
    level; their sizes are powers of two, so that few programs are compiled.

    Args:
      networks: by name.
    """

    def __init__(self, networks: Mapping[str, Pipeline]):
        self._networks = networks
        self._encoders: dict[str, Callable[[str], Text]] = {}
        for name, pipe in networks.items():
            alike = (other for other in self._encoders if _read_alike(pipe, networks[other]))
            other = next(alike, None)
            self._encoders[name] = _encoder(pipe) if other is None else self._encoders[other]
        self._compiled: set[tuple] = set()
        self._compiling = threading.Lock()

    def prepare(self) -> None:
        """Reads the networks and compiles what is asked for by default."""
        for name, pipe in self._networks.items():
            steps = default_steps(name, pipe)
            [drawn] = self.draw([Wanted(name, "", steps, 0, None, pipe.world.resolution)])
            if isinstance(drawn, Exception):
                raise drawn

    def draw(self, batch: Sequence[Wanted]) -> list[Drawn | Exception]:
        """Draws pictures of one program.

        Returns:
          A picture for each, or why there is none: `Refused` where the client can mend it.
        """
        found: dict[int, Drawn | Exception] = {}
        texts: dict[int, Text] = {}
        for row, wanted in enumerate(batch):
            try:
                texts[row] = self._encoders[wanted.network](wanted.prompt)
            except ValueError as error:
                found[row] = Refused(str(error))
        try:
            drawn = self._drawn([batch[row] for row in texts], list(texts.values()))
        except NotFinite as error:
            drawn = [Refused(str(error))] * len(texts)
        except Exception as error:
            drawn = [error] * len(texts)
        found |= dict(zip(texts, drawn))
        return [found[row] for row in range(len(batch))]

    def _drawn(self, batch: list[Wanted], texts: list[Text]) -> list[Drawn]:
        if not batch:
            return []
        size = 1 << (len(batch) - 1).bit_length()
        filled = [*range(len(batch)), *[len(batch) - 1] * (size - len(batch))]
        text = jax.tree.map(lambda *leaves: np.concatenate([leaves[row] for row in filled]), *texts)
        wanted = [batch[row] for row in filled]
        draw = functools.partial(self._pictures, wanted, text)
        program = (size, *wanted[0].program)
        if program not in self._compiled:
            with self._compiling:  # once, and outside of what is timed
                if program not in self._compiled:
                    draw()
                    self._compiled.add(program)
        began = time.perf_counter()
        pictures = draw()
        milliseconds = 1000 * (time.perf_counter() - began)
        evaluations = self._networks[wanted[0].network].evaluations(wanted[0].steps)
        return [Drawn(png(pictures[row]), evaluations, milliseconds) for row in range(len(batch))]

    def _pictures(self, batch: list[Wanted], text: Text) -> np.ndarray:
        first = batch[0]
        return self._networks[first.network].draw(
            text,
            steps=first.steps,
            seed=[wanted.seed for wanted in batch],
            guidance=[wanted.guidance for wanted in batch],
            batch_size=len(batch),
            resolution=first.resolution,
        )


def lanes() -> int:
    """How many batches are drawn at a time.

    A small network leaves cores of a processor idle, so there is one for each. Programs of several
    devices must not be started by several threads at once; those of one accelerator fill it.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encoder(pipe: Pipeline) -> Callable[[str], Text]:
    """Embeds a caption by itself, as `sample` does; the text encoders stay in memory."""
    encode = pipe.world.encoder()
    return functools.lru_cache(CAPTIONS_KEPT)(lambda prompt: encode([prompt]))


def _read_alike(pipe: Pipeline, other: Pipeline) -> bool:
    """Whether both embed captions alike, so that text encoders are in memory once."""

    def facts(pipe):
        folder = getattr(pipe.world, "folder", None)  # of FLUX's text encoders
        return type(pipe.world), folder, pipe.config.data.text_length, pipe.config.dtype

    return facts(pipe) == facts(other)
