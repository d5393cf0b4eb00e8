"""Consistency students in TrigFlow: maps to data, the same along each of the teacher's paths."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill import flow
from jax_distill.flow import Batch, Network, Text, per_sample
from jax_distill.objectives import trigflow
from jax_distill.objectives.objective import Method, View, first_kept_for_dropped
from jax_distill.objectives.settings import Rule, positive, scales, setting
from jax_distill.objectives.teacher import TeacherVelocity

GRID = 48  # steps of the schedule that the discrete loss goes along
FEWER = Rule(lambda n: 0 <= n < GRID, f"from 0 to {GRID - 1}")


class SCMDraws(NamedTuple):
    angle: jax.Array  # (B,), in (0, pi/2)
    noise: jax.Array  # (B, N, C)
    guidance: jax.Array  # (B,)


@dataclasses.dataclass(frozen=True)
class Consistency(Method):
    """The base of consistency distillation: points on the teacher's paths, and a loss between two.

    Attributes:
      network: the student.
      teacher: the velocity it learns from.
      data_scale: s_d, by which data are multiplied before noise of that scale is added.
      guidance_scales: the scales w that are drawn, uniformly.
      discrete_steps: n of `discrete_loss`, which then takes the place of the method's own; 0 for
        the latter.
      shift: of the times that the discrete loss draws and goes along.
    """

    network: Network
    teacher: TeacherVelocity
    data_scale: float = positive(0.5)
    guidance_scales: tuple[float, ...] = scales(4.0, 4.5, 5.0)
    discrete_steps: int = setting(0, FEWER)
    shift: float = positive(5.0)

    def draw_angles(self, key: jax.Array, count: tuple[int, ...]) -> jax.Array:
        """Draws the angles of the method's own loss."""
        raise NotImplementedError

    def draw(self, key: jax.Array, batch: Batch) -> SCMDraws:
        key_angle, key_noise, key_guidance = jax.random.split(key, 3)
        count = batch.x.shape[:1]
        scales = jnp.asarray(self.guidance_scales, jnp.float32)
        if self.discrete_steps:
            times = 1 - flow.uniform(key_angle, count, 0, 1 - self.discrete_steps / GRID)
            angle = flow.linear_to_trig_time(flow.shift_time(times, math.log(self.shift)))
        else:
            angle = self.draw_angles(key_angle, count)
        return SCMDraws(
            angle,
            jax.random.normal(key_noise, batch.x.shape),
            jax.random.choice(key_guidance, scales, count),
        )

    def point(self, batch: Batch, draws: SCMDraws) -> jax.Array:
        """y, (B, N, C)."""
        angle = per_sample(draws.angle, batch.x)
        return self.data_scale * (jnp.cos(angle) * batch.x + jnp.sin(angle) * draws.noise)

    def student(self, params: dict, batch: Batch, draws: SCMDraws) -> trigflow.Output:
        """F of the student as a function of (y / s_d, a)."""

        def velocity(x, t):
            return self.network.velocity(params["network"], x, t, batch.text, draws.guidance)

        return functools.partial(trigflow.trig_output, velocity)

    def guide(self, view: View, batch: Batch, draws: SCMDraws) -> trigflow.Output:
        """F of the teacher as a function of (y / s_d, a)."""

        def velocity(x, t):
            return self.teacher(view.frozen, x, t, batch.text, draws.guidance)

        return functools.partial(trigflow.trig_output, velocity)

    def discrete_target(self, params: dict, view: View, batch: Batch, draws: SCMDraws) -> jax.Array:
        """The data that the student predicts after n Euler steps of the teacher, (B, N, C)."""
        angles = trigflow.angles_after(draws.angle, self.discrete_steps, GRID, self.shift)
        z = self.point(batch, draws) / self.data_scale
        z = trigflow.walk(self.guide(view, batch, draws), z, angles)
        data = trigflow.trig_data(self.student(params, batch, draws), z, angles[-1])
        return jax.lax.stop_gradient(data)

    def discrete_loss(
        self, params: dict, view: View, batch: Batch, draws: SCMDraws
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """rCM's loss without a derivative: the summed square distance from `discrete_target`."""
        target = self.discrete_target(params, view, batch, draws)
        axes = tuple(range(1, target.ndim))
        kept = jnp.isfinite(jnp.sum(target, axes))
        if self.drop_nonfinite:
            batch, draws = first_kept_for_dropped((batch, draws), kept)
            target = jnp.where(per_sample(kept, target), target, 0)
        z = self.point(batch, draws) / self.data_scale
        data = trigflow.trig_data(self.student(params, batch, draws), z, draws.angle)
        distance = jnp.sum(jnp.square(data - target), axes)
        kept = kept | (not self.drop_nonfinite)
        metrics = {"distance": jnp.mean(distance, where=kept), "dropped_samples": jnp.sum(~kept)}
        return metrics["distance"], metrics

    def motion(self, params: dict, null: Text | None = None) -> Callable[..., jax.Array]:
        """The map to s = 0, `x - t net(x, t)`: TrigFlow's cos(a) y - sin(a) s_d F."""
        del null
        return flow.velocity_map(self.network, params["network"])
