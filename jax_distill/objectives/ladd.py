"""LADD: latent adversarial diffusion distillation, with heads on the frozen teacher's features.

Source: Sauer et al., arXiv:2403.12015; the distillation term is that of ADD, arXiv:2311.17042.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import (
    Batch,
    Network,
    Text,
    interpolate,
    per_sample,
    straight_step,
)
from jax_distill.objectives.judged import Judged, JudgeDraws
from jax_distill.objectives.objective import Method, View
from jax_distill.objectives.settings import (
    Rule,
    finite,
    not_negative,
    scales,
    setting,
    steps,
)
from jax_distill.objectives.teacher import TeacherVelocity
from jax_distill.sampling import Restart, Shifted

SHARES = Rule(
    lambda x: x and min(x) >= 0 and math.isclose(sum(x), 1, abs_tol=1e-6),
    "a list of shares whose sum is 1",
)


class LADDDraws(NamedTuple):
    place: jax.Array  # (B,), in [0, 1): which of the student's times
    noise: jax.Array  # (B, N, C)
    guidance: jax.Array  # (B,)
    judge: JudgeDraws


@dataclasses.dataclass(frozen=True)
class LADD(Judged, Method):
    """A student that makes data from noised data, judged by heads on the frozen teacher.

    The student's input is (1 - t) x + t e, at one of the times of its sampling schedule, and its
    loss is how little its sample, noised again to tau, looks real to the heads. Where data are not
    the teacher's own samples, a distillation term can hold it to what the teacher predicts of the
    noised sample: mean (1 - tau) (x - x_teacher)^2.

    Attributes:
      network: the student.
      teacher: frozen, of whose blocks the features are.
      guidance_scales: the scales w that are drawn, uniformly.
      shares: how often each time is drawn, the latest first; their number is that of the steps.
      first_shares: the same in the first `share_warmup` steps, counted from the student's first.
      distillation_weight: of the distillation term.
      time_shift: mu of the sampling schedule; 0 is uniform.
    """

    name = "ladd"
    summary = "A student by LADD (latent adversarial diffusion distillation, arXiv:2403.12015)"
    card_steps = property(lambda self: len(self.shares))

    network: Network
    teacher: TeacherVelocity
    guidance_scales: tuple[float, ...] = scales(4.0, 4.5, 5.0)
    shares: tuple[float, ...] = setting((0.7, 0.1, 0.1, 0.1), SHARES)
    first_shares: tuple[float, ...] = setting((0.0, 0.0, 0.5, 0.5), SHARES)
    share_warmup: int = steps(500)
    distillation_weight: float = not_negative(0.0)
    time_shift: float = finite(0.0)

    def __post_init__(self):
        super().__post_init__()
        if len(self.first_shares) != len(self.shares):
            raise ValueError(
                f"objective.first_shares: {self.first_shares} must have as many entries as shares,"
                f" {len(self.shares)}"
            )

    @property
    def sampled_by(self) -> Restart:
        return Restart(Shifted(self.time_shift))

    def draw(self, key: jax.Array, batch: Batch) -> LADDDraws:
        key_place, key_noise, key_guidance, key_judge = jax.random.split(key, 4)
        count = batch.x.shape[:1]
        guidance = jnp.asarray(self.guidance_scales, jnp.float32)
        return LADDDraws(
            jax.random.uniform(key_place, count),
            jax.random.normal(key_noise, batch.x.shape),
            jax.random.choice(key_guidance, guidance, count),
            self.draw_judge(key_judge, batch),
        )

    def times(self, place: jax.Array, step: jax.Array) -> jax.Array:
        """The student's times (B,) for places in [0, 1), by the shares of a step from its first."""
        times = self.sampled_by.schedule.times(len(self.shares), 1)
        shares = jnp.where(
            step < self.share_warmup, jnp.array(self.first_shares), jnp.array(self.shares)
        )
        ends = jnp.cumsum(shares)[:-1]
        return times[jnp.searchsorted(ends, place, side="right")]

    def made(self, params: dict, batch: Batch, draws: LADDDraws, step: jax.Array) -> jax.Array:
        t = self.times(draws.place, step)
        x_t = interpolate(batch.x, draws.noise, t)
        return self.motion(params)(x_t, t, jnp.zeros_like(t), batch.text, draws.guidance)

    def student_loss(
        self, own: dict, view: View, batch: Batch, draws: LADDDraws, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = self.made(own, batch, draws, moves * self.student_every)
        fooling = self.fooling(x, view, batch, draws)
        if not self.distillation_weight:
            return fooling, {}
        distillation = self.distillation(x, view, batch, draws)
        metrics = {"fooling": fooling, "distillation": distillation}
        return fooling + self.distillation_weight * distillation, metrics

    def distillation(self, x: jax.Array, view: View, batch: Batch, draws: LADDDraws) -> jax.Array:
        """The square distance of samples from what the guided teacher makes of them, noised."""
        tau = draws.judge.tau
        x_t = jax.lax.stop_gradient(interpolate(x, draws.judge.fake_noise, tau))
        velocity = self.teacher(view.frozen, x_t, tau, batch.text, draws.guidance)
        target = jax.lax.stop_gradient(straight_step(x_t, tau, jnp.zeros_like(tau), velocity))
        return jnp.mean(per_sample(1 - tau, x) * jnp.square(x - target))

    def motion(self, params: dict, null: Text | None = None) -> Callable[..., jax.Array]:
        """The map x - (t - s) net(x, t), which is asked for data, s = 0."""
        del null

        def jump(x, t, s, text, guidance):
            velocity = self.network.velocity(params["network"], x, t, text, guidance)
            return straight_step(x, t, s, velocity)

        return jump
