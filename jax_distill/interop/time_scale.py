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
import ml_dtypes
import numpy as np
from absl import logging

from jax_distill.models import mmdit
from jax_distill.models.inputs import GUIDANCE, INPUTS

_POINTS = 2048
_HALF = mmdit.TIME_FREQUENCIES // 2
# Of `rebuild`: round values in a range, what they count, features of a bump, its height.
_ROUND, _ROUND_WEIGHT, _WAVES, _PEAK = 20, 1e5, 12, 8.0
_RIDGE = 1e-7
_LARGEST_RESIDUAL = 0.02  # relative to an embedder's variation


class Refitted(NamedTuple):
    """An embedder for another factor.

    Attributes:
      embedder: its parameters, float32.
      residual: the largest difference of the two embeddings where they should agree, relative to
        the variation of the old one: its root mean square about its mean.
      step: they should agree at its multiples; 0: everywhere.
      between: the largest difference in between, likewise.
    """

    embedder: dict[str, Any]
    residual: float
    step: float
    between: float


def refit_network(
    own: mmdit.MMDiTConfig, wanted: mmdit.MMDiTConfig, tree: Mapping[str, Any]
) -> dict[str, Refitted]:
    """The embedders that other factors change, by name.

    Args:
      own: of the network.
      wanted: the same with other factors.
      tree: the network's nested `StoredLeaf`s.

    Raises:
      ValueError: an embedder cannot be fitted to its new factor.
    """
    refits = {}
    for name, factor, upper in INPUTS:
        old, new = getattr(own, factor), getattr(wanted, factor)
        if name not in tree or old == new:
            continue
        guidance = name == GUIDANCE.embedder
        embedder = jax.tree.map(lambda leaf: leaf.read(), tree[name])
        fit = rebuild if guidance and new < old else refit
        found = fit(embedder, old, new, upper)
        if found.residual > _LARGEST_RESIDUAL:
            scalar = "w" if guidance else "t"
            raise ValueError(
                f"{name}: an embedder of {new:g} {scalar} cannot be that of {old:g} {scalar}, it"
                f" would differ by {found.residual:.1e} of its variation; train the network with"
                f" --config.model.{factor}={new:g}"
            )
        message = "%s: refitted from factor %g to %g, residual %.1e, in between %.1e"
        logging.info(message, name, old, new, found.residual, found.between)
        refits[name] = found
    return refits


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


def rebuild(embedder: Mapping[str, Any], factor: float, new: float, upper: float) -> Refitted:
    """An embedder of two new layers that is the same at round values, and close if it can be.

    Unit k of the first layer is a bump at c_k, centres even on [0, upper]: silu(b (K(x - c_k) - h))
    where K(d) is the mean of cos(f d) over the fastest features f that turn by no more than 10 over
    the range, and h is K a step away, so that a bump ends there. The second layer is a regression
    on the old embedding in which multiples of the step, upper / 20, count most. Neighbouring bumps
    share a value, none cancel: unlike sums of steep ramps, it stands evaluation in bfloat16.

    Args:
      embedder, factor, new, upper: as `refit` has them; `new` may be any.
    """
    hidden, step = embedder["linear_2"]["bias"].shape[0], upper / _ROUND
    frequencies = _frequencies(new)
    chosen = np.flatnonzero(frequencies <= (1 + 1e-6) * 10 / upper)[:_WAVES]
    phases = np.linspace(0, upper, hidden) * frequencies[chosen, None]
    drop = np.mean(1 - np.cos(frequencies[chosen] * step))
    height = _PEAK / drop
    kernel = np.zeros((2 * _HALF, hidden))
    kernel[chosen] = height / len(chosen) * np.cos(phases)
    kernel[_HALF + chosen] = height / len(chosen) * np.sin(phases)
    # The differences of large numbers: whoever narrows them must not change them.
    kernel, bias = (
        leaf.astype(ml_dtypes.bfloat16).astype(np.float64)
        for leaf in (kernel, np.full(hidden, -height * (1 - drop)))
    )

    x = np.linspace(0, upper, 100 * _ROUND + 1)
    weight = np.where(np.arange(len(x)) % 100, 1.0, _ROUND_WEIGHT)
    bumps = _features(x, frequencies) @ kernel + bias
    bumps = bumps / (1 + np.exp(-np.maximum(bumps, -700)))
    bumps = np.concatenate([bumps, np.ones((len(x), 1))], axis=1)
    weighted = (bumps * weight[:, None]).T
    normal = weighted @ bumps
    normal += _RIDGE * np.trace(normal) / len(normal) * np.eye(len(normal))
    solution = np.linalg.solve(normal, weighted @ _embed(embedder, factor, x).astype(np.float64))
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
