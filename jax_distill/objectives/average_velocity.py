"""What an average velocity u(x, r, t) should be, from the velocity at t: MeanFlow's two targets.

Both follow from (t - r) u = integral of v over [r, t]: by its derivative along the flow
(arXiv:2505.13447), or by the part [m, t] of it (arXiv:2510.20771).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_distill.flow import Text, per_sample, straight_step

Student = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""u at x (B, N, C), r (B,), t (B,): (B, N, C)."""

SHORTEST = 0.005  # of finite intervals, as a share of t - r, where a warm-up ends


def average_and_target(
    student: Student,
    x: jax.Array,
    r: jax.Array,
    t: jax.Array,
    velocity: jax.Array,
    direction: jax.Array,
    step: jax.Array,
    warmup: int,
) -> tuple[jax.Array, jax.Array]:
    """As `differential_target`; in the first `warmup` steps as `finite_target`.

    The latter's share falls from 1 (the target is v) by 1/`warmup` a step, to `SHORTEST`.
    """
    given = (student, x, r, t, velocity, direction)
    if not warmup:
        return differential_target(*given)
    share = jnp.maximum(1 - step / warmup, SHORTEST)
    return jax.lax.cond(
        step < warmup,
        lambda: finite_target(*given, share),
        lambda: differential_target(*given),
    )


def differential_target(
    student: Student,
    x: jax.Array,
    r: jax.Array,
    t: jax.Array,
    velocity: jax.Array,
    direction: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """u, and v - (t - r) du/dt, the derivative by one jvp in (direction, 0, 1).

    Args:
      student: u.
      x: (B, N, C), at time t.
      r: (B,), at most t.
      t: (B,).
      velocity: v at x and t, (B, N, C).
      direction: dx/dt, (B, N, C).

    Returns:
      (B, N, C) both; the target without gradient by the derivative.
    """
    u, du = jax.jvp(student, (x, r, t), (direction, jnp.zeros_like(r), jnp.ones_like(t)))
    return u, velocity - per_sample(t - r, x) * jax.lax.stop_gradient(du)


def finite_target(
    student: Student,
    x: jax.Array,
    r: jax.Array,
    t: jax.Array,
    velocity: jax.Array,
    direction: jax.Array,
    share: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """u, and v - (1 - a)/a (u - u(x - (t - m) direction, r, m)), m = t - a (t - r), a the share.

    u agrees with it where it is a v + (1 - a) times the average over [r, m], as an average must;
    for a -> 0 it becomes the differential target.

    The share is a number or (B,), above 0; the rest as in `differential_target`.
    """
    share = jnp.where(r == t, 1.0, share)  # there u is the velocity
    middle = t - share * (t - r)
    ahead = student(straight_step(x, t, middle, direction), r, middle)
    u = student(x, r, t)
    change = jax.lax.stop_gradient(u - ahead)
    return u, velocity - per_sample((1 - share) / share, x) * change


def mixture(
    average: Callable[[Text], jax.Array],
    velocity: jax.Array,
    text: Text,
    null: Text,
    omega: float,
    kappa: float,
) -> jax.Array:
    """omega v + kappa u(text) + (1 - omega - kappa) u(null): guidance by the student's own u.

    Args:
      average: u with a caption, (B, N, C).
      velocity: v, (B, N, C).
      text: the captions.
      null: the null caption, as many times.
      omega: weight of v; a u whose weight is 0 is not evaluated.
      kappa: weight of the captions' u.
    """
    mixed = omega * velocity
    for weight, of in ((kappa, text), (1 - omega - kappa, null)):
        mixed += weight * average(of) if weight else 0
    return mixed
