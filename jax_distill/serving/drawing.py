"""Draws what clients ask for, and times it."""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jax_distill import streams
from jax_distill.evaluation.png import png
from jax_distill.flow import Text
from jax_distill.models.finite import NotFinite
from jax_distill.pipeline import Pipeline
from jax_distill.serving.parameters import Wanted, default_steps

CAPTIONS_KEPT = 32  # embedded ones; a few MB each in FLUX's world
PROGRAMS_KEPT = 32  # compiled; some 10 MB each in the shapes world


class Refused(ValueError):
    """What is asked for cannot be drawn; the message says why."""


class Drawn(NamedTuple):
    """A picture.

    Attributes:
      png: the file.
      evaluations: of the network.
      milliseconds: from the embedded caption to the pixels; of a batch, the mean.
    """

    png: bytes
    evaluations: int
    milliseconds: float


class Studio:
    """Networks that draw, each picture as `sample` draws it; may be used by several threads.

    Args:
      networks: by name.
      batch_size: the most pictures that are drawn by one call of a program.
    """

    def __init__(self, networks: Mapping[str, Pipeline], batch_size: int = 1):
        self.networks, self._batch_size = networks, batch_size
        self._encoders: dict[str, Callable[[str], Text]] = {}
        for name, pipe in networks.items():
            alike = (other for other in self._encoders if _read_alike(pipe, networks[other]))
            other = next(alike, None)
            self._encoders[name] = _encoder(pipe) if other is None else self._encoders[other]
        self._compiled: dict[tuple, None] = {}  # programs, the one used last at the end
        self._changing = threading.Lock()
        # Where batches are drawn one at a time, so is what the compiling thread draws.
        self._turn = contextlib.nullcontext() if lanes() > 1 else threading.Lock()

    def prepare(self) -> None:
        """Reads the networks and compiles what is asked for by default."""
        for name, pipe in self.networks.items():
            steps = default_steps(name, pipe)
            [drawn] = self.draw([Wanted(name, "", steps, 0, None, pipe.world.resolution)])
            if isinstance(drawn, Exception):
                raise drawn

    def ready(self, wanted: Wanted) -> bool:
        """Whether the program that draws a picture is compiled."""
        return wanted.program in self._compiled

    def compile(self, wanted: Wanted) -> None:
        """Compiles the program that draws a picture; what fails is told to who has it drawn."""
        with contextlib.suppress(Exception), self._turn, streams.default_settings():
            self._pictures([wanted], [self._encoders[wanted.network]("")])
        self._used(wanted.program)

    def _used(self, program: tuple) -> None:
        """Notes that a program is compiled and used, and lets go of the one not used longest."""
        with self._changing:
            self._compiled.pop(program, None)
            self._compiled[program] = None
            if len(self._compiled) > PROGRAMS_KEPT:
                oldest = next(iter(self._compiled))
                del self._compiled[oldest]
                network, steps, resolution = oldest
                self.networks[network].forget(steps, resolution)

    def draw(self, batch: Sequence[Wanted]) -> list[Drawn | Exception]:
        """Draws pictures of one program, at most as many as `batch_size`.

        Returns:
          A picture for each, or why there is none: `Refused` where the client can mend it.
        """
        with self._turn, streams.default_settings():  # which are a thread's own
            return self._found(batch)

    def _found(self, batch: Sequence[Wanted]) -> list[Drawn | Exception]:
        found: dict[int, Drawn | Exception] = {}
        texts: dict[int, Text] = {}
        for row, wanted in enumerate(batch):
            try:
                texts[row] = self._encoders[wanted.network](wanted.prompt)
            except ValueError as error:
                found[row] = Refused(str(error))
        if texts:
            drawn = self._drawn([batch[row] for row in texts], list(texts.values()))
            found |= dict(zip(texts, drawn))
        return [found[row] for row in range(len(batch))]

    def _drawn(self, batch: list[Wanted], texts: list[Text]) -> list[Drawn | Exception]:
        """Draws together; if that fails, each alone, so that one spoils no other."""
        try:
            pictures, seconds = self._timed(batch, texts)
        except Exception as error:
            if len(batch) > 1:
                return [one for pair in zip(batch, texts) for one in self._drawn(*zip(pair))]
            return [Refused(str(error)) if isinstance(error, NotFinite) else error]
        evaluations = self.networks[batch[0].network].evaluations(batch[0].steps)
        milliseconds = 1000 * seconds / len(batch)
        return [Drawn(png(picture), evaluations, milliseconds) for picture in pictures]

    def _timed(self, batch: list[Wanted], texts: list[Text]) -> tuple[np.ndarray, float]:
        """The pictures and the seconds that they took, without those of compiling."""
        if not self.ready(batch[0]):
            self._pictures(batch[:1], texts[:1])
        self._used(batch[0].program)
        began = time.perf_counter()
        pictures = self._pictures(batch, texts)
        return pictures, time.perf_counter() - began

    def _pictures(self, batch: Sequence[Wanted], texts: Sequence[Text]) -> np.ndarray:
        first = batch[0]
        return self.networks[first.network].draw_each(
            jax.tree.map(lambda *leaves: np.concatenate(leaves), *texts),
            steps=first.steps,
            seeds=[wanted.seed for wanted in batch],
            guidance=[wanted.guidance for wanted in batch],
            batch_size=self._batch_size,
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
