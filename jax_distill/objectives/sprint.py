"""SANA-Sprint: the loss of sCM and that of LADD together.

Source: Chen et al., arXiv:2503.09641.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Batch, interpolate, log_normal_angle, trig_to_linear_time
from jax_distill.objectives.judged import Judged, JudgeDraws
from jax_distill.objectives.objective import View
from jax_distill.objectives.scm import SCM, SCMDraws
from jax_distill.objectives.settings import finite, not_negative, share


class SprintDraws(NamedTuple):
    consistency: SCMDraws
    t: jax.Array  # (B,), of the student's input in the adversarial loss
    noise: jax.Array  # (B, N, C), likewise
    guidance: jax.Array  # (B,), likewise
    judge: JudgeDraws


@dataclasses.dataclass(frozen=True)
class Sprint(Judged, SCM):
    """sCM, whose samples are judged by heads on the frozen teacher besides.

    The student's loss is that of `SCM` and `adversarial_weight` times that of `Judged`, for samples
    from another point: from noise alone, or from an angle drawn as those of sCM are.

    Attributes:
      adversarial_weight: of the heads' opinion.
      noise_share: how often the samples that are judged begin at noise.
      mismatched, judge_mean: see `Judged`; the latter as published for angles, whose tangent is
        divided by a deviation of the data of 0.5: -0.6 + log 2.
    """

    name = "sprint"
    summary = "A student by SANA-Sprint's sum of sCM and LADD (arXiv:2503.09641)"

    adversarial_weight: float = not_negative(0.5)
    noise_share: float = share(0.5)
    mismatched: bool = True
    judge_mean: float = finite(-0.6 + math.log(2))
    heads_weight = 0.5

    def draw(self, key: jax.Array, batch: Batch) -> SprintDraws:
        key, key_angle, key_start, key_noise, key_judge = jax.random.split(key, 5)
        count = batch.x.shape[:1]
        consistency = super().draw(key, batch)
        angle = log_normal_angle(key_angle, count, self.angle_mean, self.angle_std, self.data_scale)
        from_noise = jax.random.bernoulli(key_start, self.noise_share, count)
        return SprintDraws(
            consistency,
            jnp.where(from_noise, 1.0, trig_to_linear_time(angle)),
            jax.random.normal(key_noise, batch.x.shape),
            consistency.guidance,
            self.draw_judge(key_judge, batch),
        )

    def made(self, params: dict, batch: Batch, draws: SprintDraws, step: jax.Array) -> jax.Array:
        del step
        x_t = interpolate(batch.x, draws.noise, draws.t)
        zero = jnp.zeros_like(draws.t)
        return self.motion(params, None)(x_t, draws.t, zero, batch.text, draws.guidance)

    def student_loss(
        self, own: dict, view: View, batch: Batch, draws: SprintDraws, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        consistency, metrics = self.loss(own, view, batch, draws.consistency, moves)
        made = self.made(own, batch, draws, moves)
        fooling = self.fooling(made, view, batch, draws)
        metrics |= {"consistency": consistency, "fooling": fooling}
        return consistency + self.adversarial_weight * fooling, metrics
