"""Distribution matching with discriminator heads, which are trained beside the fake score.

Source: the diffusion GAN term of DMD2, arXiv:2405.14867, with FastGen's heads and penalty.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Batch, Text, interpolate
from jax_distill.models import heads
from jax_distill.objectives import adversarial
from jax_distill.objectives.matching import FAKE, Matching
from jax_distill.objectives.objective import View
from jax_distill.objectives.scores import ScoreTimes
from jax_distill.objectives.settings import choice, not_negative


class HeadDraws(NamedTuple):
    """Of what only heads see."""

    real_t: jax.Array  # (B,), times of data
    real_noise: jax.Array  # (B, N, C), of data
    penalty_noise: jax.Array  # (B, N, C), of the penalty


@dataclasses.dataclass(frozen=True)
class MatchingWithHeads(Matching):
    """The base of methods whose samples are judged by heads as well, where `gan_weight` is not 0.

    The heads tell noised data from the student's noised samples, by the hidden tokens of a network.
    They are in the fake score's tree and move with it.

    Attributes:
      gan_weight: of the student's adversarial loss; 0 for no heads.
      head_weight: of the heads' loss, beside the fake score's.
      gan_features: the network whose tokens they see, "teacher" or "fake", which then learns by
        the heads' loss, too (DMD2).
      gan_blocks: the numbers of its blocks.
      penalty_weight, penalty_size: of the heads' `adversarial.approximate_r1`, and a.
    """

    gan_weight: float = not_negative(0.0)
    head_weight: float = not_negative(1.0)
    gan_features: str = choice("teacher", "fake")
    gan_blocks: tuple[int, ...] = (3,)
    penalty_weight: float = not_negative(0.0)
    penalty_size: float = not_negative(0.1)

    def init(self, key: jax.Array, params: dict) -> dict[str, Any]:
        made = super().init(key, params)
        if self.gan_weight:
            hidden, _ = adversarial.widths(params)
            made[FAKE]["heads"] = heads.init_heads(key, self.gan_blocks, hidden, hidden // 2)
        return made

    def draw_heads(self, key: jax.Array, batch: Batch, times: ScoreTimes) -> HeadDraws:
        key_times, key_noise = jax.random.split(key)
        noises = jax.random.normal(key_noise, (2, *batch.x.shape))
        return HeadDraws(times.draw(key_times, batch.x.shape[:1]), *noises)

    def logits(
        self,
        fake: dict,
        view: View,
        x_t: jax.Array,
        t: jax.Array,
        text: Text,
        guidance: jax.Array,
    ) -> jax.Array:
        """What the heads in the fake score's tree say of x_t (B, N, C) at t (B,).

        Returns:
          (B, K), above zero for data; a gradient reaches x_t.
        """
        given = (x_t, t, text, guidance)
        if self.gan_features == "teacher":
            return adversarial.teacher_logits(
                fake["heads"], self.teacher, view.frozen, *given, self.gan_blocks
            )
        features = self.network.features(fake["network"], *given, blocks=self.gan_blocks)
        return heads.logits(fake["heads"], features, self.gan_blocks, self.network.grid)

    def head_loss(
        self,
        fake: dict,
        view: View,
        x_t: jax.Array,
        t: jax.Array,
        batch: Batch,
        guidance: jax.Array,
        draws: HeadDraws,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The heads' loss between noised data and samples x_t, noised to t, with its penalty."""

        def logits(x, t):
            return self.logits(fake, view, x, t, batch.text, guidance)

        noised = interpolate(batch.x, draws.real_noise, draws.real_t)
        real, made = logits(noised, draws.real_t), logits(x_t, t)
        loss = adversarial.discriminator_loss(real, made)
        metrics = {"real_logit": jnp.mean(real), "fake_logit": jnp.mean(made)}
        if self.penalty_weight:
            moved = logits(noised + self.penalty_size * draws.penalty_noise, draws.real_t)
            loss += self.penalty_weight * adversarial.approximate_r1(real, moved)
        return loss, metrics
