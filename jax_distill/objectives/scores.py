"""Differences of scores, and losses made of them: pure functions.

Of a noised sample, the teacher and a score of the student's samples predict different data. The
difference says which way the density of the samples should move. Source: DMD, arXiv:2311.18828.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill import flow
from jax_distill.flow import path_velocity, per_sample


def mean_of_sample(x: jax.Array) -> jax.Array:
    """The mean over all axes but the first, (B, ...) -> (B, 1, ...)."""
    return jnp.mean(x, tuple(range(1, x.ndim)), keepdims=True)


def predicted_data(x_t: jax.Array, t: jax.Array, velocity: jax.Array) -> jax.Array:
    """The data ``x_t - t v`` that a velocity (B, ...) at time t (B,) points to, in float32."""
    dtype = jnp.promote_types(x_t.dtype, jnp.float32)
    return flow.straight_step(x_t.astype(dtype), t, jnp.zeros_like(t), velocity.astype(dtype))


def score_difference(
    x: jax.Array,
    fake: jax.Array,
    real: jax.Array,
    *,
    added: float = 0.0,
    least: float = 0.0,
    normalize: bool = True,
) -> jax.Array:
    """The gradient of distribution matching, (f - r) / mean |x - r|, a mean over each sample.

    Args:
      x: the student's data (B, ...).
      fake: f, what the fake score predicts of the noised x.
      real: r, what the teacher predicts, guidance included.
      added: to the divisor (1e-6 in FastGen).
      least: the divisor's lower bound (1e-5 in rCM).
      normalize: False for f - r alone.

    Returns:
      (B, ...), without gradient, zero where it would not be finite: to be descended along.

    Source: arXiv:2405.14867, equations 3 and 7 of its predecessor arXiv:2311.18828.
    """
    divisor = jnp.maximum(mean_of_sample(jnp.abs(x - real)), least) + added
    gradient = (fake - real) / divisor if normalize else fake - real
    return jax.lax.stop_gradient(jnp.nan_to_num(gradient, posinf=0.0, neginf=0.0))


def pulled(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """(x - sg(x - g))^2, element by element: its derivative by x is 2 g, its value g^2."""
    return jnp.square(x - jax.lax.stop_gradient(x - gradient))


def velocity_loss(
    velocity: jax.Array, x: jax.Array, noise: jax.Array, t: jax.Array, predicts: str = "velocity"
) -> jax.Array:
    """The error of a fake score's velocity at ``(1 - t) x + t e``, a mean a sample: (B,).

    Args:
      velocity: what it says (B, ...).
      x: the student's data.
      noise: e.
      t: (B,).
      predicts: whose square error: "velocity", or "data", which is t^2 times as much.
    """
    error = velocity.astype(jnp.promote_types(velocity.dtype, jnp.float32)) - path_velocity(
        x, noise
    )
    square = jnp.square(error if predicts == "velocity" else per_sample(t, error) * error)
    return jnp.mean(square, tuple(range(1, x.ndim)))


class ScoreTimes(NamedTuple):
    """The times that samples are noised to: moved by a shift, then within [low, high].

    Attributes:
      kind: "uniform" or "logit_normal".
      mean, std: of the latter, before the sigmoid.
      shift: mu of `flow.shift_time`.
      low, high: the times that 0 and 1 become.
    """

    kind: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 0.0
    low: float = 0.02
    high: float = 0.98

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if self.kind == "uniform":
            t = flow.uniform(key, shape)
        else:
            t = flow.logit_normal(key, shape, self.mean, self.std)
        return self.low + flow.shift_time(t, self.shift) * (self.high - self.low)
