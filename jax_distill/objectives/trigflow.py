"""TrigFlow of velocity networks: outputs, what they change by along a path, and steps on it.

Here z = cos(a) x + sin(a) e (B, N, C), at the angle a (B,): data of scale 1, as networks see it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_distill.flow import (
    linear_to_trig_time,
    per_sample,
    shift_time,
    trig_to_linear,
    trig_to_linear_time,
    trig_velocity,
)

Output = Callable[[jax.Array, jax.Array], jax.Array]
"""F of (z, a): dz/da, as a network predicts it."""


def trig_output(
    velocity: Callable[[jax.Array, jax.Array], jax.Array], z: jax.Array, angle: jax.Array
) -> jax.Array:
    """TrigFlow's F of a velocity function (x_t, t), at z (B, N, C) and angle (B,)."""
    t, x_t = trig_to_linear_time(angle), trig_to_linear(z, angle, 1.0)
    return trig_velocity(x_t, t, velocity(x_t, t))


def trig_data(output: Output, z: jax.Array, angle: jax.Array) -> jax.Array:
    """The data ``cos(a) z - sin(a) F`` that an output points to."""
    a = per_sample(angle, z)
    return jnp.cos(a) * z - jnp.sin(a) * output(z, angle)


def output_and_change(
    output: Output, z: jax.Array, angle: jax.Array, direction: jax.Array, by: str, h: float
) -> tuple[jax.Array, jax.Array]:
    """F, and cos(a) sin(a) times its derivative by the angle along a path.

    Args:
      output: the function.
      z: (B, N, C).
      angle: (B,).
      direction: dz/da of the path (B, N, C).
      by: "jvp", by one forward-mode pass; "difference", without any, as
        ``(cos(h) F(z, a) - F(cos(h) z - sin(h) dz/da, a - h)) / sin(h)``; or "mixed", forward mode
        in z and this difference in a alone. Differences err by O(h).
      h: of the differences, in radians.

    Source: rCM (arXiv:2510.08431), types 2 and 1 of its finite differences.
    """
    speed = jnp.cos(angle) * jnp.sin(angle)
    change = per_sample(speed, z) * direction
    if by == "jvp":
        return jax.jvp(output, (z, angle), (change, speed))
    if by == "mixed":
        now, change = jax.jvp(lambda point: output(point, angle), (z,), (change,))
        before = output(z, angle - h)
    else:
        now, change = output(z, angle), 0.0
        before = output(math.cos(h) * z - math.sin(h) * direction, angle - h)
    return now, change + per_sample(speed, z) * (math.cos(h) * now - before) / math.sin(h)


def angles_after(angle: jax.Array, steps: int, of: int, shift: float) -> jax.Array:
    """Angles (steps + 1, B) from `angle` (B,) on, as a schedule of `of` shifted steps goes.

    Source: rCM's discrete loss, with 48 steps and a shift of 5.
    """
    mu = math.log(shift)
    even = shift_time(trig_to_linear_time(angle), -mu) - jnp.arange(steps + 1)[:, None] / of
    later = linear_to_trig_time(shift_time(jnp.maximum(even, 0), mu))
    return later.at[0].set(angle)


def walk(output: Output, z: jax.Array, angles: jax.Array) -> jax.Array:
    """Euler's steps ``z - (a - a') F`` through angles (steps + 1, B)."""

    def step(z, pair):
        angle, after = pair
        return z - per_sample(angle - after, z) * output(z, angle), None

    return jax.lax.scan(step, z, (angles[:-1], angles[1:]))[0]
