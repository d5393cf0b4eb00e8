"""An embedder of a scalar as one of the scalar times another factor: 1000 t for t, w for 1000 w.

The embedder's features are cosines and sines of s x f, s the factor and f = 10^(-4 k / 128). Those
of x with frequencies from 1 to 1/10 are among those of 1000 x, 96 places later; the slower ones are
so smooth on [0, 1], or [0, 10], that they are sums of those, to rounding. So to a larger factor it
is the first layer alone that changes, and nothing is lost.

To a smaller factor the fast features are lost. A guidance scale is drawn with at round values, and
there a new embedder of two layers can be what the old one is.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_distill.models import mmdit

RANGES = {"time_embedder": 1.0, "interval_embedder": 1.0, "guidance_embedder": 10.0}
"""Largest values that the embedders are given."""
_POINTS = 2048
_HALF = mmdit.TIME_FREQUENCIES // 2
_STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of `interpolate`, for a range of 1


class Refitted(NamedTuple):
    """An embedder for another factor.

    Attributes:
      embedder: its parameters, float32.
      residual: the largest difference of the two embeddings where they are to agree, relative to
        the variation of the old one: its root mean square about its mean.
      step: they are to agree at multiples of it; 0 everywhere.
      between: the largest difference in between, likewise.
    """

    embedder: dict[str, Any]
    residual: float
    step: float
    between: float


def refit(embedder: Mapping[str, Any], factor: float, new: float, upper: float = 1.0) -> Refitted:
    """An embedder that is the same function at another factor, by its first layer.

    Args:
      embedder: parameters, {"linear_1": {"kernel", "bias"}, "linear_2": ...}.
      factor: that the old one's input is multiplied with.
      new: that of the new one, the same or a larger one.
      upper: the inputs are in [0, upper].
    """
    x = np.linspace(0, upper, _POINTS)
    before, after = _frequencies(factor), _frequencies(new)
    # Features that turn faster than any of the old ones have no part in this.
    slow = after <= before.max() * (1 + 1e-6)
    basis = np.concatenate([_features(x, after) * np.tile(slow, 2), np.ones((_POINTS, 1))], axis=1)
    solution, *_ = np.linalg.lstsq(basis, _features(x, before), rcond=1e-10)
    for index, frequency in enumerate(before):  # where they are among the new ones, exactly
        same = np.flatnonzero(np.isclose(after, frequency, rtol=1e-9))
        for offset in (0, _HALF) if same.size else ():
            solution[:, offset + index] = 0
            solution[offset + same[0], offset + index] = 1
    kernel, bias = (np.asarray(embedder["linear_1"][key], np.float64) for key in ("kernel", "bias"))
    first = {"kernel": solution[:-1] @ kernel, "bias": solution[-1] @ kernel + bias}
    return _compared(embedder, factor, {**embedder, "linear_1": first}, new, upper, 0.0)


def interpolate(embedder: Mapping[str, Any], factor: float, new: float, upper: float) -> Refitted:
    """An embedder that is the same at round values, and close to straight in between.

    Unit k of the first layer is silu(+-a (sin(g x) - sin(g c_k))), knots c_k even on [0, upper], g
    the feature's frequency, near 1 / upper, and 1 / a half the distance of two knots: a ramp, up in
    the upper half and down in the lower. The second layer is the smallest that meets the old
    embedding at multiples of the step, the finest of `_STEPS` that has no more than the units.

    Args:
      embedder, factor, new, upper: as `refit` has them; `new` may be any.
    """
    hidden = embedder["linear_2"]["bias"].shape[0]
    step = upper * next(step for step in _STEPS if round(1 / step) < hidden)
    x = np.linspace(0, upper, round(upper / step) + 1)
    frequencies = _frequencies(new)
    place = int(np.argmin(np.abs(np.log(frequencies * upper))))
    knots = np.linspace(0, upper, hidden)
    slope = np.where(knots > upper / 2, 2.0, -2.0) * hidden
    bias = -slope * np.sin(frequencies[place] * knots)
    kernel = np.zeros((2 * _HALF, hidden))
    kernel[_HALF + place] = slope
    ramps = np.sin(frequencies[place] * x)[:, None] * slope + bias
    ramps = ramps / (1 + np.exp(-np.maximum(ramps, -700)))
    ramps = np.concatenate([ramps, np.ones((len(x), 1))], axis=1)
    target = _embed(embedder, factor, x).astype(np.float64)
    gram = ramps @ ramps.T
    gram += 1e-14 * np.trace(gram) / len(x) * np.eye(len(x))
    solution = ramps.T @ np.linalg.solve(gram, target)
    layers = {
        "linear_1": {"kernel": kernel, "bias": bias},
        "linear_2": {"kernel": solution[:-1], "bias": solution[-1]},
    }
    return _compared(embedder, factor, layers, new, upper, step)


def _compared(
    old: Mapping[str, Any],
    factor: float,
    layers: Mapping[str, Any],
    new: float,
    upper: float,
    step: float,
) -> Refitted:
    """The new embedder in float32, with what it is off by."""
    embedder = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(layers))

    def difference(x):
        before = _embed(old, factor, x)
        scale = np.sqrt(np.mean(np.square(before - before.mean(axis=0)))) or 1.0
        return float(np.abs(_embed(embedder, new, x) - before).max() / scale)

    everywhere = difference(np.linspace(0, upper, _POINTS))
    if not step:
        return Refitted(embedder, everywhere, step, everywhere)
    at_steps = difference(np.linspace(0, upper, round(upper / step) + 1))
    return Refitted(embedder, at_steps, step, everywhere)


def _embed(embedder: Mapping[str, Any], factor: float, x: np.ndarray) -> np.ndarray:
    """(M,) -> (M, hidden size)."""
    parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), dict(embedder))
    return np.asarray(mmdit.scalar_embedding(parameters, jnp.asarray(factor * x, jnp.float32)))


def _frequencies(factor: float) -> np.ndarray:
    """Of the embedder's features as functions of its input, (128,)."""
    return factor * 10000.0 ** (-np.arange(_HALF) / _HALF)


def _features(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """(M,) -> (M, 256): cosines, then sines, in float64."""
    angles = x[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
