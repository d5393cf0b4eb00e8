"""The adversarial part of a method: heads on features of the frozen teacher, which judge samples.

Source: LADD, arXiv:2403.12015; captions of other pictures as in SANA-Sprint, arXiv:2503.09641.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Batch, Text, interpolate, logit_normal
from jax_distill.models.heads import init_heads
from jax_distill.objectives import adversarial
from jax_distill.objectives.objective import STUDENT, Player, View
from jax_distill.objectives.settings import (
    Rule,
    choice,
    finite,
    not_negative,
    positive,
    setting,
    steps,
)

HEADS = "heads"
BLOCKS = Rule(lambda x: x and min(x) >= 0 and len(set(x)) == len(x), "a list of blocks")


class JudgeDraws(NamedTuple):
    """Where samples are judged."""

    tau: jax.Array  # (B,), their times
    fake_noise: jax.Array  # (B, N, C), of the student's samples
    real_noise: jax.Array  # (B, N, C), of data
    perturbation: jax.Array  # (B, N, C), of data, for the penalty


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What adversarial methods share: heads on the frozen teacher, and who moves when.

    A method adds a student whose `made` samples are judged; its draws have `judge` and `guidance`.
    Data and samples are noised to tau, a logit-normal time, each with noise of its own.

    Attributes:
      blocks: of the teacher, on whose outputs heads are; all those of the bundled one.
      head_width: channels within a head.
      gan_loss: "hinge" or "softplus".
      mismatched: data with the captions of their neighbours in the (micro-)batch are fakes, too.
      judge_mean, judge_std: tau = sigmoid(mean + std n).
      r1_weight: of the approximate R1 penalty.
      r1_size: of the perturbation.
      r1_input: "noised" data are perturbed, or "clean" ones, see `adversarial.perturbed_input`.
      heads_first: steps at the start in which the heads move alone. If `mismatched` they learn
        captions then, without samples: new heads know none, and lead a student astray that follows
        them; and where the samples of a student that stands still are fakes, telling those is all
        that they learn.
      student_every: after those the heads move at every step, the student before them at each N-th.
    """

    blocks: tuple[int, ...] = setting((0, 1, 2, 3, 4, 5), BLOCKS)
    head_width: int = positive(128, 2**15)
    gan_loss: str = choice("hinge", "softplus")
    mismatched: bool = False
    judge_mean: float = finite(1.0)
    judge_std: float = positive(1.0)
    r1_weight: float = not_negative(0.0)
    r1_size: float = positive(0.1)
    r1_input: str = choice("noised", "clean")
    heads_first: int = steps(0)
    student_every: int = positive(1, 10**4)

    heads_weight = 1.0  # of their loss, beside the penalty

    @property
    def players(self) -> dict[str, Player]:
        return {
            STUDENT: Player(self.student_loss, averaged=True),
            HEADS: Player(self.heads_loss, optimizer=HEADS),
        }

    def init(self, key: jax.Array, params: dict) -> dict[str, Any]:
        key_student, key_heads = jax.random.split(key)
        hidden, pooled = adversarial.widths(params)
        made = init_heads(key_heads, self.blocks, hidden, self.head_width, pooled)
        return {STUDENT: self.init_student(key_student, params), HEADS: made}

    def turn(self, step: int) -> tuple[str, ...]:
        after = step - self.heads_first
        return (HEADS,) if after < 0 or after % self.student_every else (STUDENT, HEADS)

    def draw_judge(self, key: jax.Array, batch: Batch) -> JudgeDraws:
        if self.mismatched and len(batch.x) < 2:
            raise ValueError(
                "objective.mismatched: a batch of one has no other caption; set it to False, or"
                " make batch_size / accumulate 2 or more"
            )
        key, key_tau = jax.random.split(key)
        tau = logit_normal(key_tau, batch.x.shape[:1], self.judge_mean, self.judge_std)
        return JudgeDraws(tau, *jax.random.normal(key, (3, *batch.x.shape)))

    def made(self, params: dict, batch: Batch, draws: Any, step: jax.Array) -> jax.Array:
        """The student's samples (B, N, C) at a step, the student's first being 0."""
        raise NotImplementedError

    def logits(
        self,
        heads: dict,
        view: View,
        x_t: jax.Array,
        t: jax.Array,
        text: Text,
        guidance: jax.Array,
    ) -> jax.Array:
        """How real noised samples (B, N, C) look with captions, (B, K)."""
        return adversarial.teacher_logits(
            heads, self.teacher, view.frozen, x_t, t, text, guidance, self.blocks
        )

    def fooling(self, x: jax.Array, view: View, batch: Batch, draws: Any) -> jax.Array:
        """The student's loss by the heads' opinion of its samples x, differentiable in them."""
        x_t = interpolate(x, draws.judge.fake_noise, draws.judge.tau)
        logits = self.logits(
            view.nets[HEADS], view, x_t, draws.judge.tau, batch.text, draws.guidance
        )
        return adversarial.generator_loss(logits, self.gan_loss)

    def heads_loss(
        self, own: dict, view: View, batch: Batch, draws: Any, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The heads' loss: data are real, samples are not, nor are data with other captions."""
        judge = draws.judge
        step = moves - self.heads_first
        made = jax.lax.stop_gradient(self.made(view.nets[STUDENT], batch, draws, step))
        real = interpolate(batch.x, judge.real_noise, judge.tau)
        points = [(real, batch.text), (interpolate(made, judge.fake_noise, judge.tau), batch.text)]
        if self.mismatched:
            points.append((real, jax.tree.map(lambda leaf: jnp.roll(leaf, 1, 0), batch.text)))
        if self.r1_weight:
            moved = (batch.x, real, judge.perturbation, self.r1_size, self.r1_input)
            points.append((adversarial.perturbed_input(*moved), batch.text))
        x_t, text = jax.tree.map(lambda *rows: jnp.concatenate(rows), *points)
        tau, guidance = (jnp.tile(v, len(points)) for v in (judge.tau, draws.guidance))
        logits = self.logits(own, view, x_t, tau, text, guidance)
        real, *others = jnp.split(logits, len(points))
        fakes = others[:-1] if self.r1_weight else others
        loss = adversarial.discriminator_loss(real, jnp.concatenate(fakes), self.gan_loss)
        if self.mismatched and self.heads_first:
            of_captions = adversarial.discriminator_loss(real, fakes[1], self.gan_loss)
            loss = jnp.where(step < 0, of_captions, loss)
        loss = self.heads_weight * loss
        metrics = {"real": jnp.mean(real)}
        metrics |= {name: jnp.mean(x) for name, x in zip(("fake", "mismatched"), fakes)}
        if self.r1_weight:
            metrics["r1"] = adversarial.approximate_r1(real, others[-1])
            loss = loss + self.r1_weight * metrics["r1"]
        return loss, metrics
