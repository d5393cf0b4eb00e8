"""MeanFlow: average velocities, learned from their instantaneous ones.

Source: Geng et al., arXiv:2505.13447; as a distillation, T2I-Distill, arXiv:2512.13006. The
finite-interval warm-up is the target of AlphaFlow, arXiv:2510.20771.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import (
    Batch,
    Network,
    Text,
    average_velocity_map,
    interpolate,
    path_velocity,
    per_sample,
    sorted_logit_normal,
)
from jax_distill.objectives.average_velocity import average_and_target, mixture
from jax_distill.objectives.objective import Method, View, drop_text
from jax_distill.objectives.settings import (
    choice,
    finite,
    not_negative,
    positive,
    scales,
    share,
    steps,
)
from jax_distill.objectives.teacher import TeacherVelocity
from jax_distill.sampling import PushForward, Shifted


class MeanFlowDraws(NamedTuple):
    t: jax.Array  # (B,)
    r: jax.Array  # (B,), at most t
    noise: jax.Array  # (B, N, C)
    guidance: jax.Array  # (B,)
    dropped: jax.Array  # (B,) bool: captions replaced by the null caption


@dataclasses.dataclass(frozen=True)
class MeanFlow(Method):
    """Distils the average velocity u(x_t, t, r) = (x_t - X(x_t, t -> r)) / (t - r).

    The network takes h = t - r through a second time embedder. With u and du = du/dt along the flow
    from one jvp of (x, r, t) -> net(x, t, t - r) in the direction (v, 0, 1),

      e = u - sg(v~ - (t - r) du),    loss = mean over the batch of |e|^2 / sg(|e|^2 + c)^p,

    |e|^2 summed over a sample. The target velocity v~ is the teacher's at guidance w, or, for t in
    [mix_from, mix_to] and where the caption is kept, the mixture

      v~ = omega v_teacher + kappa u(x_t, t, h', c) + (1 - omega - kappa) u(x_t, t, h', null),

    no gradient through any of it. The jvp's direction v is v~ where it is a mixture.

    For the first `discrete_warmup` steps it is that of finite intervals, see `average_and_target`.

    Attributes:
      network: the student, with a second time embedder.
      teacher: the velocity it learns from.
      time_mean, time_std: of the two logit-normal draws, sorted into r <= t.
      equal_share: probability that r = t.
      guidance_scales: the scales w that are drawn, uniformly.
      drop_rate: share of captions replaced by the null caption.
      interval_start: how the second embedder starts: "zeros" keeps the teacher exactly, "copy" is
        the first one's parameters (T2I-Distill).
      target_velocity: "teacher", or "sample" for e - x.
      jvp_velocity: direction v where v~ is no mixture: "teacher" (marginal), or "sample" for e - x
        (T2I-Distill). With both "sample" no teacher is evaluated.
      omega, kappa: of the mixture; 1 and 0 for none.
      mix_from, mix_to: the window of times in which velocities are mixed.
      mix_interval: False is h' = 0 (MeanFlow), True is h' = t - r (T2I-Distill).
      loss_power, loss_constant: p and c.
      discrete_warmup: steps; 0 for none.
      time_shift: mu of the sampling schedule; None: the world's, or FLUX's for so many tokens.
    """

    name = "meanflow"
    summary = "A student by MeanFlow (arXiv:2505.13447)"
    card_steps = 4

    network: Network
    teacher: TeacherVelocity
    time_mean: float = finite(-0.4)
    time_std: float = positive(1.0)
    equal_share: float = share(0.25)
    guidance_scales: tuple[float, ...] = scales(4.0, 4.5, 5.0)
    drop_rate: float = share(0.1)
    interval_start: str = choice("zeros", "copy")
    target_velocity: str = choice("teacher", "sample")
    jvp_velocity: str = choice("teacher", "sample")
    omega: float = finite(1.0)
    kappa: float = finite(0.0)
    mix_from: float = share(0.0)
    mix_to: float = share(1.0)
    mix_interval: bool = False
    loss_power: float = not_negative(1.0)
    loss_constant: float = positive(1e-3)
    discrete_warmup: int = steps(0)
    time_shift: float | None = finite(None)

    def check_run(self, dtype: str) -> Iterable[str]:
        if self.mix_from > self.mix_to:
            raise ValueError(f"objective.mix_from: {self.mix_from} is after mix_to, {self.mix_to}")
        if self.discrete_warmup and dtype == "bfloat16":
            raise ValueError(
                "objective.discrete_warmup: finite intervals compare velocities that bfloat16"
                " rounds to the same; set dtype=float32, or discrete_warmup=0 for the derivative"
            )
        untrained = 1 - self.omega - self.kappa
        if abs(untrained) > 1e-6 and self.drop_rate == 0:
            raise ValueError(
                "objective.drop_rate: 0 trains no null caption, of which omega and kappa mix in"
                f" {untrained:g}; set 0.1, or omega and kappa that add to 1"
            )
        return ()

    @property
    def sampled_by(self) -> PushForward:
        return PushForward(Shifted(self.time_shift))

    def init_student(self, key: jax.Array, params: dict) -> dict:
        if self.interval_start == "copy":
            copied = jax.tree.map(jnp.array, params["time_embedder"])
            params = {**params, "interval_embedder": copied}
        return {"network": params}

    def draw(self, key: jax.Array, batch: Batch) -> MeanFlowDraws:
        key_times, key_noise, key_guidance, key_drop = jax.random.split(key, 4)
        count = batch.x.shape[:1]
        times = sorted_logit_normal(
            key_times, count, self.time_mean, self.time_std, self.equal_share
        )
        return MeanFlowDraws(
            *times,
            jax.random.normal(key_noise, batch.x.shape),
            jax.random.choice(key_guidance, jnp.asarray(self.guidance_scales, jnp.float32), count),
            jax.random.bernoulli(key_drop, self.drop_rate, count),
        )

    def velocities(
        self, params: dict, view: View, batch: Batch, draws: MeanFlowDraws
    ) -> tuple[jax.Array, jax.Array]:
        """The target velocity v~ and the jvp's direction, (B, N, C) each, no gradient."""
        x_t = interpolate(batch.x, draws.noise, draws.t)
        null = view.frozen["null"]
        null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), null, batch.text)
        text = drop_text(batch.text, null, draws.dropped)
        choices = {"sample": lambda: path_velocity(batch.x, draws.noise)}
        choices["teacher"] = lambda: self.teacher(view.frozen, x_t, draws.t, text, draws.guidance)
        wanted = {self.target_velocity, self.jvp_velocity}
        made = {name: make() for name, make in choices.items() if name in wanted}
        target, direction = made[self.target_velocity], made[self.jvp_velocity]
        if (self.omega, self.kappa) != (1.0, 0.0):
            h = draws.t - draws.r if self.mix_interval else jnp.zeros_like(draws.t)

            def average(text):
                return self.network.velocity(
                    params["network"], x_t, draws.t, text, draws.guidance, h
                )

            mixed = mixture(average, target, batch.text, null, self.omega, self.kappa)
            inside = (draws.t >= self.mix_from) & (draws.t <= self.mix_to) & ~draws.dropped
            target, direction = (
                jnp.where(per_sample(inside, mixed), mixed, other) for other in (target, direction)
            )
        return jax.lax.stop_gradient((target, direction))

    def target(
        self, params: dict, view: View, batch: Batch, draws: MeanFlowDraws, step: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The student's u, (B, N, C), and what it should be, no gradient."""
        velocity, direction = self.velocities(params, view, batch, draws)
        text = drop_text(batch.text, view.frozen["null"], draws.dropped)
        x_t = interpolate(batch.x, draws.noise, draws.t)

        def student(x, r, t):
            return self.network.velocity(params["network"], x, t, text, draws.guidance, t - r)

        points = (x_t, draws.r, draws.t, velocity, direction)
        return average_and_target(student, *points, step, self.discrete_warmup)

    def loss(
        self, params: dict, view: View, batch: Batch, draws: MeanFlowDraws, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        u, target = self.target(params, view, batch, draws, step)
        square = jnp.sum(jnp.square(u - target), axis=tuple(range(1, u.ndim)))
        weight = jax.lax.stop_gradient(square + self.loss_constant) ** -self.loss_power
        return jnp.mean(weight * square), {"error": jnp.mean(square) / u[0].size}

    def motion(self, params: dict, null: Text | None = None) -> Callable[..., jax.Array]:
        """The flow map x - (t - s) u(x, t, t - s)."""
        return average_velocity_map(self.network, params["network"])
