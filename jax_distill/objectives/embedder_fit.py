"""Refitting an embedder: the same function of its input, in another scale and without ripples.

`refit_embedder` is one linear solve; `fit_quality` measures what it has made. Used by time rescale
and wherever a student embeds the guidance scale in other units than its teacher.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The sinusoids that embedders see, cosines and then sines, see `models/mmdit.py`.
FEATURES = 256
_FREQUENCIES = 10000.0 ** (-np.arange(FEATURES // 2) / (FEATURES // 2))


def refit_embedder(
    embed: Callable[[np.ndarray], jax.Array],
    hidden: int,
    *,
    factor: float = 1.0,
    upper: float = 1.0,
    sharpness: float = 40.0,
    points: int = 4096,
    ridge: float = 5e-4,
) -> dict:
    """An embedder of `factor` v that follows any function of v on [0, upper], by one linear solve.

    The first layer is set, not trained. It reads a single sinusoid, sin(f v), the one that is
    steepest among those monotonic up to `upper`; with u = sin(f v) / sin(f upper) in [0, 1], unit k
    is silu(+-a (u - c_k)), knots c_k even in v, a the sharpness. These are smooth ramps that bend
    over distances of about 1/a and no faster, so what the old embedder does faster than that is
    left out: it is what makes d(net)/dt large. The second layer is a ridge regression in float64.
    (Weighting the channels by how much the modulation depends on them would change nothing: all
    channels share the same features.)

    The ramps are nearly dependent. A small ridge buys little and costs much: large weights that
    cancel, which no rounding survives (see `fit_quality`). A larger ridge with a larger sharpness
    follows as closely.

    Such ramps reach a: a step of Adam that moves every weight by 1e-4 moves the embedding as far as
    all of [0, upper] does. Train it at a rate for that, or not at all (`optimizer.frozen`).

    Args:
      embed: the old embedder's output at values (M,) in [0, upper], (M, hidden).
      hidden: width of the embedder.
      factor: what the network multiplies v with before it takes sinusoids.
      upper: largest value; the smallest is 0.
      sharpness: a, in units of 1 / upper.
      points: values that are fitted, even on [0, upper].
      ridge: weight of the squared coefficients, relative to the number of points.

    Returns:
      Parameters of the embedder, {"linear_1": {"kernel", "bias"}, "linear_2": ...}, float32.
    """
    # Frequencies fall by 10 in 32 features: the first that turns by no more than a radian.
    half = FEATURES // 2
    index = int(np.clip(np.ceil(32 * np.log10(factor * upper) - 1e-9), 0, half - 1))
    frequency = factor * _FREQUENCIES[index]
    knots = np.sin(frequency * np.linspace(0, upper, (hidden + 1) // 2))
    knots = np.concatenate([knots, knots])[:hidden]
    # A number that bfloat16 has: ramps do not all shift where the embedder is stored in it.
    steepness = np.float64(jnp.bfloat16(sharpness / np.sin(frequency * upper)))
    slope = np.where(np.arange(hidden) < (hidden + 1) // 2, steepness, -steepness)
    bias = -slope * knots
    kernel = np.zeros((FEATURES, hidden))
    kernel[half + index] = slope

    values = np.linspace(0, upper, points)
    target = np.asarray(embed(values.astype(np.float32)), np.float64)
    ramp = np.sin(frequency * values)[:, None] * slope + bias
    ramp = np.concatenate([ramp / (1 + np.exp(-ramp)), np.ones((points, 1))], axis=1)
    normal = ramp.T @ ramp + ridge * points * np.eye(hidden + 1)
    solution = np.linalg.solve(normal, ramp.T @ target)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32),
        {
            "linear_1": {"kernel": kernel, "bias": bias},
            "linear_2": {"kernel": solution[:-1], "bias": solution[-1]},
        },
    )


class FitQuality(NamedTuple):
    """How well an embedder follows another one, and how much of that roundings leave.

    Attributes:
      error: rms of the difference, over the variation: the rms of the old embedding less its mean.
      condition: what independent rounding errors of the second layer's weights, relative to each
        of them, are multiplied with to come out relative to the variation. Such errors are about
        1e-3 (rms) in bfloat16 and 2e-8 in float32.
    """

    error: float
    condition: float


def fit_quality(
    old: Callable[[np.ndarray], jax.Array],
    new: Callable[[np.ndarray], jax.Array],
    embedder: dict,
    *,
    factor: float = 1.0,
    upper: float = 1.0,
    points: int = 1000,
) -> FitQuality:
    """Measures what `refit_embedder` has made, between the points that it was fitted at.

    Args:
      old: the embedder that was to be followed, values (M,) -> (M, hidden).
      new: the one that follows, as the network evaluates it.
      embedder: parameters of the new one.
      factor: as in `refit_embedder`.
      upper: likewise.
      points: values that are compared.
    """
    values = ((np.arange(points) + 0.5) / points * upper).astype(np.float32)
    expected = np.asarray(old(values), np.float64)
    variation = np.sqrt(np.mean(np.square(expected - expected.mean(0)))) or 1.0
    difference = np.asarray(new(values), np.float64) - expected
    first, second = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), embedder[name])
        for name in ("linear_1", "linear_2")
    )
    angles = factor * values[:, None].astype(np.float64) * _FREQUENCIES
    hidden = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) @ first["kernel"]
    hidden = hidden + first["bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    squares = np.square(hidden) @ np.square(second["kernel"])
    return FitQuality(
        float(np.sqrt(np.mean(np.square(difference))) / variation),
        float(np.sqrt(np.mean(squares)) / variation),
    )
