"""Measures that see collapse: diversity of a prompt's pictures, distances of sets of pictures.

The score asks whether a picture is right, so a network that draws one right picture of each prompt
again and again has a perfect one. These measures tell it from its teacher; `docs/measures.md` says
how far they can be trusted at their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from scipy.spatial.distance import pdist

from jax_distill import streams
from jax_distill.evaluation import variety
from jax_distill.evaluation.benchmarks.distances import frechet
from jax_distill.evaluation.results import Measures
from jax_distill.models.latents import LatentCodec
from jax_distill.pipeline import Pipeline
from jax_distill.worlds.shapes import renderer
from jax_distill.worlds.shapes.renderer import Prompt

BATCH = 60  # pictures encoded at a time
LEAST_PROMPTS = 128  # of a distance: four times the number of features


class Diversity(NamedTuple):
    """How much several pictures of one prompt differ; means over prompts.

    Attributes:
      latents: distance of two pictures' latents, see `pairwise`.
      place, size: of the objects that were asked for, see `variety.Variety`; in pixels.
      color: likewise, over the prompts that leave a colour open; 0 if there are none.
      twice: share of prompts with two right pictures or more. Others count as 0 in place, size and
        colour, since nothing tells their pictures from noise.
    """

    latents: float
    place: float
    size: float
    color: float
    twice: float


def pairwise(values: np.ndarray) -> float:
    """The mean distance between two pictures of a prompt: root mean squares over the elements.

    Unbiased for any number of pictures: the mean over all pairs of K independent draws has the
    mean of one pair.

    Args:
      values: (P, K, ...), K of each of P prompts.
    """
    flat = np.asarray(values, np.float64).reshape(*values.shape[:2], -1)
    return float(np.mean([pdist(each) for each in flat]) / flat.shape[-1] ** 0.5)


def diversity_of(latents: np.ndarray, pictures: np.ndarray, prompts: Sequence[Prompt]) -> Diversity:
    """The diversity of pictures that are drawn.

    Args:
      latents: (P, K, N, C), K of each of P prompts.
      pictures: (P, K, 64, 64, 3) uint8, what they decode to.
      prompts: P of them.
    """
    requests = [prompt.request for prompt in prompts]
    found = [variety.among(*each) for each in zip(pictures, requests, strict=True)]
    seen = [each or variety.Variety(0.0, 0.0, 0.0) for each in found]
    colors = [
        each.color for each, request in zip(seen, requests) if variety.leaves_color_open(request)
    ]
    return Diversity(
        latents=pairwise(latents),
        place=float(np.mean([each.place for each in seen])),
        size=float(np.mean([each.size for each in seen])),
        color=float(np.mean(colors)) if colors else 0.0,
        twice=float(np.mean([each is not None for each in found])),
    )


def diversity(
    pipe: Pipeline,
    steps: int,
    prompts: Sequence[Prompt],
    *,
    pictures: int = 8,
    seed: int = 0,
    guidance: float | None = None,
) -> Diversity:
    """The diversity of a network in so many sampling steps, from `pictures` noises a prompt."""
    captions = [prompt.caption for prompt in prompts for _ in range(pictures)]
    with streams.default_settings():
        text = pipe.world.encode(captions)
        latents = pipe.latents(text, steps=steps, seed=seed, guidance=guidance)
        drawn = pipe.world.codec.decode(latents, *pipe.world.resolution)
    shape = len(prompts), pictures
    return diversity_of(
        latents.reshape(*shape, *latents.shape[1:]),
        drawn.reshape(*shape, *drawn.shape[1:]),
        prompts,
    )


def renders(prompts: Sequence[Prompt], pictures: int, seed: int | Sequence[int]) -> np.ndarray:
    """Real pictures of prompts, (P, `pictures`, 64, 64, 3) uint8."""
    rng = np.random.default_rng(seed)
    drawn = [[renderer.picture(p.request, rng)[1] for _ in range(pictures)] for p in prompts]
    return np.array(drawn)


def real_diversity(
    codec: LatentCodec,
    prompts: Sequence[Prompt],
    *,
    pictures: int = 8,
    seed: int | Sequence[int] = 0,
) -> Diversity:
    """The diversity of real pictures of the same prompts, encoded into latents."""
    drawn = renders(prompts, pictures, seed)
    latents = _encoded(codec, drawn.reshape(-1, *drawn.shape[2:]))
    return diversity_of(latents.reshape(*drawn.shape[:2], *latents.shape[1:]), drawn, prompts)


def features(codec: LatentCodec, pictures: np.ndarray) -> np.ndarray:
    """Features of pictures for `frechet`: (B, 2c), for c channels of the autoencoder.

    Of each channel of a picture's latents the mean and the deviation over its places: what is in a
    picture and how crisp, not where.

    Args:
      codec: the autoencoder.
      pictures: (B, H, W, 3) uint8.
    """
    tokens = _encoded(codec, pictures)
    channels = tokens.reshape(*tokens.shape[:2], -1, 4)  # a token is four places, channels first
    return np.concatenate([channels.mean((1, 3)), channels.std((1, 3))], axis=1)


def _encoded(codec: LatentCodec, pictures: np.ndarray) -> np.ndarray:
    """Latents (B, N, 4c) float64 of pictures, some at a time."""
    starts = range(0, len(pictures), BATCH)
    with streams.default_settings():
        parts = [np.asarray(codec.encode(pictures[start : start + BATCH])) for start in starts]
    return np.concatenate(parts).astype(np.float64)


def variance(values: np.ndarray) -> float:
    """The total variance of features (n, d): the trace of their covariance."""
    return float(values.var(0, ddof=1).sum())


def floor(values: np.ndarray, strata: Sequence[int], *, splits: int = 16, seed: int = 0) -> float:
    """The distance that `frechet` finds between two sets of this size and one distribution.

    The distance of such sets falls as 1/n (Chong and Forsyth, 2020, arXiv:1911.07023), so that of
    two halves of one set is twice as large: half of its mean over random splits is returned.

    Args:
      values: (n, d) features of independent pictures.
      strata: n numbers; pictures with the same one are shared out evenly, as where two sets are of
        the same prompts.
      splits: how many.
      seed: of the splits.
    """
    rng = np.random.default_rng(seed)
    orders = [np.lexsort((rng.random(len(values)), strata)) for _ in range(splits)]
    return (
        float(np.mean([frechet(values[order[::2]], values[order[1::2]]) for order in orders])) / 2
    )


class Yardstick:
    """Real pictures, and a teacher's, against which networks are measured.

    Distances are in units of the total variance of real pictures' features. There are none with
    fewer than `LEAST_PROMPTS` prompts, too few for the features' covariance.

    Args:
      codec: the autoencoder.
      prompts: of the distances, one picture each.
      diverse: prompts of the diversity.
      pictures: of each of them.
      seed: of the noise.
      guidance: scale; the networks' own by default.
    """

    def __init__(
        self,
        codec: LatentCodec,
        prompts: Sequence[Prompt],
        diverse: Sequence[Prompt],
        *,
        pictures: int = 8,
        seed: int = 0,
        guidance: float | None = None,
    ):
        self._codec, self._prompts, self._diverse = codec, prompts, diverse
        self._pictures, self._seed, self._guidance = pictures, seed, guidance
        self._real = self._teacher = None
        requests = [repr(prompt.request) for prompt in prompts]
        self._strata = np.unique(requests, return_inverse=True)[1]
        if len(prompts) >= LEAST_PROMPTS:
            self._real, self._other = (
                features(codec, renders(prompts, 1, (seed, stream))[:, 0]) for stream in (1, 2)
            )

    def set_teacher(self, pictures: np.ndarray) -> None:
        """Gives the teacher's pictures of the prompts, drawn from `seed`."""
        if self._real is not None:
            self._teacher = features(self._codec, pictures)

    def draw_teacher(self, pipe: Pipeline, steps: int) -> None:
        """Draws the teacher's pictures, where they are needed."""
        if self._real is not None:
            self.set_teacher(self._drawn(pipe, steps, self._seed))

    def real(self) -> Measures:
        """Of real pictures; their distance to real ones is that of two sets."""
        found = real_diversity(
            self._codec, self._diverse, pictures=self._pictures, seed=(self._seed, 0)
        )
        return Measures(*found, *self._distances(self._other if self._real is not None else None))

    def teacher(self, pipe: Pipeline, steps: int) -> Measures:
        """Of the teacher; its distance to itself is what two sets of its pictures would have."""
        measured = Measures(*self._diversity(pipe, steps))
        if self._teacher is None:
            return measured
        to_real, _ = self._distances(self._teacher)
        to_itself = floor(self._teacher, self._strata) / variance(self._real)
        return measured._replace(to_real=to_real, to_teacher=to_itself)

    def network(self, pipe: Pipeline, steps: int) -> Measures:
        """Of a network in so many steps, from noise that the teacher's pictures are not from.

        From the same noise a student's pictures are much like the teacher's, one by one, and their
        sets nearer than two independent ones of the teacher's own.
        """
        measured = Measures(*self._diversity(pipe, steps))
        logging.info("%d steps: diversity %.3f in latents", steps, measured.latents)
        if self._real is None:
            return measured
        other = (self._seed + 1) % (streams.MOST_SEED + 1)
        drawn = self._drawn(pipe, steps, other)
        to_real, to_teacher = self._distances(features(self._codec, drawn))
        return measured._replace(to_real=to_real, to_teacher=to_teacher)

    def _drawn(self, pipe: Pipeline, steps: int, seed: int) -> np.ndarray:
        captions = [prompt.caption for prompt in self._prompts]
        return pipe(captions, steps=steps, seed=seed, guidance=self._guidance)

    def _diversity(self, pipe: Pipeline, steps: int) -> Diversity:
        return diversity(
            pipe,
            steps,
            self._diverse,
            pictures=self._pictures,
            seed=self._seed,
            guidance=self._guidance,
        )

    def _distances(self, values: np.ndarray | None) -> tuple[float | None, float | None]:
        """To real pictures and to the teacher's."""
        sets = (self._real, self._teacher)
        if values is None:
            return None, None
        unit = variance(self._real)
        return tuple(None if each is None else frechet(values, each) / unit for each in sets)
