"""A time embedder of t as one of 1000 t: the inverse of the time rescale, for stock diffusers.

The embedder's features are cosines and sines of s t w, s the time scale and w = 10^(-4 k / 128).
Those of t with frequencies from 1 to 1/10 are among those of 1000 t, 96 places later; the slower
ones are so smooth on [0, 1] that they are sums of those, to rounding. So it is the first layer
alone that changes, and nothing is lost.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_distill.models import mmdit
from jax_distill.models.mmdit import MMDiTConfig

EMBEDDERS = ("time_embedder", "interval_embedder")
_POINTS = 2048
_HALF = mmdit.TIME_FREQUENCIES // 2


class Refitted(NamedTuple):
    """An embedder for another time scale.

    Attributes:
      embedder: its parameters, in the type of the old ones.
      residual: the largest difference of the two embeddings over [0, 1], relative to the root mean
        square of the old one.
    """

    embedder: dict[str, Any]
    residual: float


def refit(config: MMDiTConfig, embedder: Mapping[str, Any], time_scale: float) -> Refitted:
    """An embedder that is the same function of t at another time scale.

    Args:
      config: of the network that the embedder is of.
      embedder: parameters, {"linear_1": {"kernel", "bias"}, "linear_2": ...}.
      time_scale: the new one.
    """
    t = np.linspace(0, 1, _POINTS)
    old, new = _frequencies(config.time_scale), _frequencies(time_scale)
    # Features that turn faster than any of the old ones have no part in this.
    slow = new <= old.max() * (1 + 1e-6)
    basis = np.concatenate([_features(t, new) * np.tile(slow, 2), np.ones((_POINTS, 1))], axis=1)
    solution, *_ = np.linalg.lstsq(basis, _features(t, old), rcond=1e-12)
    for index, frequency in enumerate(old):  # where they are among the new ones, exactly
        same = np.flatnonzero(np.isclose(new, frequency, rtol=1e-9))
        for offset in (0, _HALF) if same.size else ():
            solution[:, offset + index] = 0
            solution[offset + same[0], offset + index] = 1
    kernel, bias = (np.asarray(embedder["linear_1"][key], np.float64) for key in ("kernel", "bias"))
    dtype = embedder["linear_1"]["kernel"].dtype
    first = {
        "kernel": (solution[:-1] @ kernel).astype(dtype),
        "bias": (solution[-1] @ kernel + bias).astype(dtype),
    }
    refitted = {"linear_1": first, "linear_2": dict(embedder["linear_2"])}
    rescaled = dataclasses.replace(config, time_scale=time_scale)

    def embed(config, embedder):
        parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), embedder)
        return np.asarray(mmdit.time_embedding(config, parameters, jnp.asarray(t, jnp.float32)))

    before, after = embed(config, dict(embedder)), embed(rescaled, refitted)
    scale = float(np.sqrt(np.mean(np.square(before)))) or 1.0
    return Refitted(refitted, float(np.abs(after - before).max()) / scale)


def _frequencies(time_scale: float) -> np.ndarray:
    """Of the embedder's features as functions of t, (128,)."""
    return time_scale * 10000.0 ** (-np.arange(_HALF) / _HALF)


def _features(t: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """(M,) -> (M, 256): cosines, then sines, in float64."""
    angles = t[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
