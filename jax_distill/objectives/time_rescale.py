"""Time rescale: from a network that embeds 1000 t to one that embeds t.

sCM and MeanFlow differentiate the network by time, and through 1000 t that derivative blows up.
Two stages: `refit_time_embedder` fits the time embedder alone, as a function of t on [0, 1];
`TimeRescale` then fine-tunes the whole network by velocity matching. The same step distils
classifier-free guidance into the embedded guidance scale when the teacher has none.

Source: T2I-Distill, arXiv:2512.13006, which trains from rescaled teachers.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_distill import sampling
from jax_distill.flow import Network, interpolate, shift_time
from jax_distill.objectives.objective import Batch
from jax_distill.objectives.teacher import TeacherVelocity

SINE = 128  # the sinusoidal feature sin(t), of frequency one: see `models/mmdit.py`


def refit_time_embedder(
    embed: Callable[[np.ndarray], jax.Array],
    hidden: int,
    *,
    features: int = 256,
    sharpness: float = 20.0,
    points: int = 4096,
    ridge: float = 1e-6,
) -> dict:
    """A time embedder of t itself that follows one of 1000 t, by one least-squares solve.

    The first layer is set, not trained: unit k is silu(+-a (sin t - sin c_k)), knots c_k even on
    [0, 1], a the sharpness; these are smooth ramps that can bend only over distances of about 1/a,
    so what the old embedder does faster than that is left out: it is what makes d(net)/dt large.
    The second layer is then a linear regression in float64. (Weighting the channels by how much
    the modulation depends on them would change nothing: all channels share the same features.)

    Such ramps reach a: a step of Adam that moves every weight by 1e-4 moves the embedding as far as
    all of [0, 1] does. Train it at a rate for that, or not at all (`optimizer.frozen`).

    Args:
      embed: the old embedder's output at times (M,) in [0, 1], (M, hidden).
      hidden: width of the embedder.
      features: width of its sinusoidal input.
      sharpness: a.
      points: times that are fitted, even on [0, 1].
      ridge: weight of the squared coefficients, relative to the number of points.

    Returns:
      Parameters of the embedder, {"linear_1": {"kernel", "bias"}, "linear_2": ...}, float32.
    """
    knots = np.linspace(0, 1, (hidden + 1) // 2)
    knots = np.concatenate([knots, knots])[:hidden]
    slope = np.where(np.arange(hidden) < (hidden + 1) // 2, sharpness, -sharpness)
    kernel = np.zeros((features, hidden))
    kernel[SINE] = slope
    bias = -slope * np.sin(knots)

    t = np.linspace(0, 1, points)
    target = np.asarray(embed(t.astype(np.float32)), np.float64)
    ramp = np.sin(t)[:, None] * slope + bias
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


class TimeRescaleDraws(NamedTuple):
    t: jax.Array  # (B,)
    noise: jax.Array  # (B, N, C)
    guidance: jax.Array  # (B,)


@dataclasses.dataclass(frozen=True)
class TimeRescale:
    """Velocity matching, `mean |v_new(x_t, t, c, w) - sg(v_old(x_t, t, c, w))|^2`.

    Attributes:
      network: the new network.
      teacher: velocity of the old one.
      guidance_scales: the scales w that are drawn, uniformly.
      solver, time_shift: of the sampler, as in `FlowMatching`.
    """

    rows_per_example = 1

    network: Network
    teacher: TeacherVelocity
    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)
    solver: str = "euler"
    time_shift: float | None = None

    def __post_init__(self):
        if self.time_shift is None:
            object.__setattr__(self, "time_shift", 0.0)

    def init(self, key: jax.Array, params: dict) -> dict:
        del key
        return {"network": params}

    def draw(self, key: jax.Array, batch: Batch) -> TimeRescaleDraws:
        key_t, key_noise, key_guidance = jax.random.split(key, 3)
        count = batch.x.shape[:1]
        scales = jnp.asarray(self.guidance_scales, jnp.float32)
        return TimeRescaleDraws(
            jax.random.uniform(key_t, count),
            jax.random.normal(key_noise, batch.x.shape),
            jax.random.choice(key_guidance, scales, count),
        )

    def loss(
        self, params: dict, frozen: dict, batch: Batch, draws: TimeRescaleDraws, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        x_t = interpolate(batch.x, draws.noise, draws.t)
        old = self.teacher(frozen, x_t, draws.t, batch.text, draws.guidance)
        old = jax.lax.stop_gradient(old)
        new = self.network.velocity(params["network"], x_t, draws.t, batch.text, draws.guidance)
        loss = jnp.mean(jnp.square(new - old))
        relative = jnp.sqrt(loss / jnp.mean(jnp.square(old)))
        return loss, {"relative_velocity_error": relative}

    def sample(self, params, noise, text, null, guidance, key, steps):
        """Integrates the network's velocity, whose input the guidance scale is."""
        del null, key

        def velocity(x, t, text, guidance):
            return self.network.velocity(params["network"], x, t, text, guidance)

        times = shift_time(sampling.uniform_times(steps), self.time_shift)
        return sampling.solve(
            velocity, noise, times, text, guidance, solver=sampling.SOLVERS[self.solver]
        )


class Comparison(NamedTuple):
    """What a rescaled network has kept, and what it has gained."""

    velocity_error: jax.Array  # rms(v_new - v_old) / rms(v_old)
    time_derivative: jax.Array  # rms of d(net)/dt of the new network, x held
    old_time_derivative: jax.Array  # the same of the old one


def compare(
    new: Callable[[jax.Array, jax.Array], jax.Array],
    old: Callable[[jax.Array, jax.Array], jax.Array],
    x_t: jax.Array,
    t: jax.Array,
) -> Comparison:
    """Compares two velocities (x, t) -> v at x_t (B, N, C) and t (B,)."""

    def with_derivative(velocity):
        return jax.jvp(lambda t: velocity(x_t, t), (t,), (jnp.ones_like(t),))

    def rms(x):
        return jnp.sqrt(jnp.mean(jnp.square(x)))

    v_new, d_new = with_derivative(new)
    v_old, d_old = with_derivative(old)
    return Comparison(rms(v_new - v_old) / rms(v_old), rms(d_new), rms(d_old))
