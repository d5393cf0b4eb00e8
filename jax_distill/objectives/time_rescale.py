"""Time rescale: from a network that embeds 1000 t to one that embeds t.

sCM and MeanFlow differentiate the network by time, and through 1000 t that derivative blows up.
Two stages: `refit_embedder` fits the time embedder alone, as a function of t on [0, 1];
`TimeRescale` then fine-tunes the whole network by velocity matching. The same step distils
classifier-free guidance into the embedded guidance scale when the teacher has none.

Source: T2I-Distill, arXiv:2512.13006, which trains from rescaled teachers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_distill.flow import Batch, Network, Text, interpolate
from jax_distill.objectives.embedder_fit import refit_embedder
from jax_distill.objectives.objective import Method, View
from jax_distill.objectives.settings import choice, finite, scales
from jax_distill.objectives.teacher import TeacherVelocity
from jax_distill.sampling import SOLVERS, Shifted, Solve


def refit_time_embedder(
    embed: Callable[[np.ndarray], jax.Array], hidden: int, **settings: float
) -> dict:
    """As `refit_embedder`, of the time t on [0, 1], which the network takes as it is."""
    return refit_embedder(embed, hidden, **settings)


class TimeRescaleDraws(NamedTuple):
    t: jax.Array  # (B,)
    noise: jax.Array  # (B, N, C)
    guidance: jax.Array  # (B,)


@dataclasses.dataclass(frozen=True)
class TimeRescale(Method):
    """Velocity matching, `mean |v_new(x_t, t, c, w) - sg(v_old(x_t, t, c, w))|^2`.

    Attributes:
      network: the new network.
      teacher: velocity of the old one.
      guidance_scales: the scales w that are drawn, uniformly.
      solver, time_shift: of the sampler, as in `FlowMatching`.
    """

    name = "time_rescale"
    summary = "A teacher whose network takes the time in another scale"

    network: Network
    teacher: TeacherVelocity
    guidance_scales: tuple[float, ...] = scales(4.0, 4.5, 5.0)
    solver: str = choice(*SOLVERS)
    time_shift: float | None = finite(None)

    @property
    def sampled_by(self) -> Solve:
        return Solve(Shifted(self.time_shift or 0.0), self.solver)

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
        self, params: dict, view: View, batch: Batch, draws: TimeRescaleDraws, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        x_t = interpolate(batch.x, draws.noise, draws.t)
        old = self.teacher(view.frozen, x_t, draws.t, batch.text, draws.guidance)
        old = jax.lax.stop_gradient(old)
        new = self.network.velocity(params["network"], x_t, draws.t, batch.text, draws.guidance)
        loss = jnp.mean(jnp.square(new - old))
        relative = jnp.sqrt(loss / jnp.mean(jnp.square(old)))
        return loss, {"relative_velocity_error": relative}

    def motion(self, params: dict, null: Text | None = None) -> Callable[..., jax.Array]:
        """The network's velocity, which takes the guidance scale as an input."""
        del null
        return functools.partial(self.network.velocity, params["network"])


class Comparison(NamedTuple):
    """How far a rescaled network is from the old one, and how smooth both are in time."""

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
