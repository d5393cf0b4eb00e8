"""rCM: sCM's loss, and beside it distribution matching on the student's own rollouts.

The first keeps the student to the teacher's paths, and to all that they lead to; the second makes
sharp what a jump along them would average. Source: arXiv:2510.08431.
"""

import dataclasses
import math
import operator
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Batch, interpolate, trig_to_linear_time
from jax_distill.objectives.matching import FAKE, WHOLE, Matching, RolloutDraws, draw_rollout
from jax_distill.objectives.objective import STUDENT, View
from jax_distill.objectives.scm import SCM, SCMDraws
from jax_distill.objectives.scores import ScoreTimes, pulled, score_difference, velocity_loss
from jax_distill.objectives.settings import (
    Rule,
    choice,
    finite,
    not_negative,
    positive,
    scales,
    setting,
    steps,
)
from jax_distill.sampling import Listed, Restart

FALLING = Rule(
    lambda angles: (
        angles and angles[0] <= math.pi / 2 and all(map(operator.gt, angles, (*angles[1:], 0)))
    ),
    "a list of falling angles, from pi / 2 at most",
)


class RCMDraws(NamedTuple):
    scm: SCMDraws
    rollout: RolloutDraws
    later: jax.Array  # (steps - 1, B), times of restarts, before each is bounded by the last
    t: jax.Array  # (B,), of the scores
    noise: jax.Array  # (B, N, C), likewise


@dataclasses.dataclass(frozen=True)
class RCM(Matching, SCM):
    """Score-regularised consistency distillation.

    The student's loss is that of `SCM`, in rCM's form, and beside it

      sum (x - sg(x - g))^2,    g = (f - r) / max(mean |x - r|, c),

    sum and mean over each sample x of a rollout of 1 to `steps` jumps, by turns, of which the last
    one is differentiated; f and r are what the fake score and the teacher predict of x, noised. The
    fake score's loss is sum (x - x0)^2 / sin^2(a), x0 its prediction at an angle a, on rollouts of
    its own.

    Attributes, beside those of `SCM` and of `Matching`:
      scm_weight: of the first loss, which has a factor of 100 by its `weighting` where it takes a
        derivative; at 0 it is not computed, nor is a derivative.
      dmd_weight: of the second loss.
      scm_steps: moves of the student by the first loss, before all else; none where that has no
        weight.
      guidance_scales: see `Matching`; the original counts from the conditional velocity, 5.
      least: c.
      steps: the longest rollout.
      restarts: their times are "drawn" as those of the scores are, uniform under `shift`, each at
        most the one before; or "listed", those of the sampler.
      sample_angles: of the sampler, which begins at the first of them in any number of steps.
    """

    name = "rcm"
    summary = "A student by rCM (score-regularised consistency distillation, arXiv:2510.08431)"
    card_steps = 4
    middle_angle: ClassVar[None] = None  # no setting: `sample_angles` are in its place

    data_scale: float = positive(1.0)
    angle_mean: float = finite(0.7)
    guidance_scales: tuple[float, ...] = scales(6.0)
    tangent_warmup: int = steps(1000)
    warmup: str = choice("rcm", "scm")
    weighting: str = choice("sum", "learned")
    drop_nonfinite: bool = True
    scm_weight: float = not_negative(1.0)
    dmd_weight: float = positive(1.0)
    scm_steps: int = steps(1000)
    least: float = positive(1e-5)
    steps: int = setting(4, WHOLE)
    restarts: str = choice("drawn", "listed")
    sample_angles: tuple[float, ...] = setting((math.atan(80), 1.5, 1.4, 1.0), FALLING)

    def __post_init__(self):
        super().__post_init__()
        if self.restarts == "listed" and self.steps > len(self.sample_angles):
            raise ValueError(
                f"objective.steps: rollouts of {self.steps} jumps need as many sample_angles, and"
                f" there are {len(self.sample_angles)}; list more, or set restarts=drawn"
            )

    @property
    def sampled_by(self) -> Restart:
        return Restart(Listed.of_angles(self.sample_angles))

    @property
    def alone(self) -> int:
        """Moves of the student before the fake score is used, and moves."""
        return self.scm_steps if self.scm_weight else 0

    def turn(self, step: int) -> tuple[str, ...]:
        return (STUDENT,) if step < self.alone else super().turn(step)

    def draw(self, key: jax.Array, batch: Batch) -> RCMDraws:
        keys = jax.random.split(key, 5)
        count = len(batch.x)
        times = ScoreTimes(shift=math.log(self.shift), low=0.0, high=1.0)
        return RCMDraws(
            super().draw(keys[0], batch),
            draw_rollout(keys[1], batch, self.steps),
            times.draw(keys[2], (self.steps - 1, count)),
            times.draw(keys[3], (count,)),
            jax.random.normal(keys[4], batch.x.shape),
        )

    def rollout_times(self, draws: RCMDraws) -> jax.Array:
        """(steps + 1, B), from 1 to 0."""
        later = draws.later
        if self.restarts == "listed":
            listed = trig_to_linear_time(jnp.array(self.sample_angles[1 : self.steps]))
            later = jnp.broadcast_to(listed[:, None], later.shape)
        ends = jnp.ones_like(draws.t)[None], jnp.zeros_like(draws.t)[None]
        return jax.lax.cummin(jnp.concatenate([ends[0], later, ends[1]]))

    def made(self, params: dict, batch: Batch, draws: RCMDraws, moves: jax.Array) -> jax.Array:
        """Data of a rollout, whose length follows the player's moves; the last jump is trained."""
        rollout = draws.rollout._replace(count=moves % self.steps)
        given = batch.text, draws.scm.guidance
        x, t = self.rollout(params, batch, rollout, self.rollout_times(draws), given[1])
        return self.data(params, x, t, *given)

    def gradient(self, x: jax.Array, view: View, batch: Batch, draws: RCMDraws) -> jax.Array:
        """g, (B, N, C)."""
        x, given = jax.lax.stop_gradient(x), (batch.text, draws.scm.guidance)
        x_t = interpolate(x, draws.noise, draws.t)
        fake = self.data(view.nets[FAKE], x_t, draws.t, *given)
        return score_difference(x, fake, self.real(view, x_t, draws.t, *given), least=self.least)

    def dmd_loss(
        self, own: dict, view: View, batch: Batch, draws: RCMDraws, moves: jax.Array
    ) -> jax.Array:
        """The second loss, a scalar."""
        x = self.made(own, batch, draws, moves)
        return jnp.sum(pulled(x, self.gradient(x, view, batch, draws))) / len(x)

    def student_loss(
        self, own: dict, view: View, batch: Batch, draws: RCMDraws, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        def matched():
            return self.dmd_loss(own, view, batch, draws, moves)

        if not self.scm_weight:
            dmd = matched()
            return self.dmd_weight * dmd, {"dmd": dmd}
        scm, metrics = self.loss(own, view, batch, draws.scm, moves)
        dmd = jax.lax.cond(moves >= self.alone, matched, lambda: jnp.zeros_like(scm))
        loss = self.scm_weight * scm + self.dmd_weight * dmd
        return loss, {**metrics, "scm": scm, "dmd": dmd}

    def fake_loss(
        self, own: dict, view: View, batch: Batch, draws: RCMDraws, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = jax.lax.stop_gradient(self.made(view.nets[STUDENT], batch, draws, moves))
        x_t = interpolate(x, draws.noise, draws.t)
        velocity = self.velocity(own, x_t, draws.t, batch.text, draws.scm.guidance)
        # x - x0 is t times the velocity's error, and sin(a) is t / |(1 - t, t)|.
        weight = x[0].size * (draws.t**2 + (1 - draws.t) ** 2)
        return jnp.mean(weight * velocity_loss(velocity, x, draws.noise, draws.t)), {}
