"""DMD2: a student whose samples are distributed as the teacher's, by the difference of two scores.

Source: Yin et al., arXiv:2405.14867. The terms that others have added are switches: heads with
FastGen's settings; f-distill, arXiv:2502.15681; decoupled terms, arXiv:2511.22677; a fake score
that follows the student, SenseFlow, arXiv:2506.00523.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Batch, interpolate, per_sample
from jax_distill.objectives import adversarial
from jax_distill.objectives.matching import FAKE, WHOLE, RolloutDraws, draw_rollout
from jax_distill.objectives.matching_with_heads import HeadDraws, MatchingWithHeads
from jax_distill.objectives.objective import STUDENT, Player, View
from jax_distill.objectives.scores import ScoreTimes, pulled, score_difference, velocity_loss
from jax_distill.objectives.settings import choice, finite, not_negative, scales, setting, share
from jax_distill.sampling import Restart, Shifted


class DMD2Draws(NamedTuple):
    rollout: RolloutDraws
    index: jax.Array  # (B,), which of the times the input has, where data are noised
    t: jax.Array  # (B,), of the scores
    noise: jax.Array  # (B, N, C), likewise
    guidance: jax.Array  # (B,)
    share: jax.Array  # (B,), in [0, 1): of the input's time, where guidance has a term of its own
    share_noise: jax.Array  # (B, N, C), likewise
    heads: HeadDraws


class Made(NamedTuple):
    """Samples of the student."""

    x: jax.Array  # (B, N, C)
    t: jax.Array  # (B,), of the input that they were made of


@dataclasses.dataclass(frozen=True)
class DMD2(MatchingWithHeads):
    """Distribution matching with a fake score, on the steps of the sampler.

    The student's data x, made of its input in one step, are noised to x_t at a drawn t. With f and
    r, the data that the fake score and the guided teacher predict of x_t,

      g = (f - r) / (mean |x - r| + c),    loss = 1/2 mean (x - sg(x - g))^2,

    means over all elements, but in g over those of a sample. The fake score learns the velocity
    e - x at x_t, from samples of the student.

    The student's input is that of one step of its sampler, at times of an even schedule under a
    shift: pure noise, or what the steps before made of it, without gradient.

    Attributes:
      steps: K, of the sampler that is trained; 1, 2, .. up to K of them can be drawn with.
      time_shift: mu of the sampler's schedule; None: the world's, or FLUX's for so many tokens.
      time_start: where it begins. Near 1 the teacher's network hardly looks at its input: with the
        bundled one, a step from 0.87 scores 0.27 untrained, and one from 1 scores 0.02.
      inputs: "simulated", of a rollout of the sampler, or "noised" data (FastGen).
      guidance_scales: the scales w that are drawn, uniformly.
      score_times, score_mean, score_std, score_shift, score_from, score_to: of t, see `ScoreTimes`.
      added: c.
      fake_predicts: the fake score's error is that of its "velocity", or of its "data".
      decoupled: two terms, each divided by its own mean: f - r at t for r of the teacher without
        guidance; and what guidance adds to r, at a time from `score_from` to the input's.
      divergence: whose weights multiply f - r, see `adversarial.DIVERGENCES`; "reverse_kl" has
        none, the others need heads.
      follow: the share of the way to the student that the fake score goes after each of its moves.
      proximal: p; 0 for the loss above. Else g is that of x' in the place of x, the sample of the
        running average of the student, which the fake score learns too, and the loss is
        1/2 mean (x - sg(x' - p g))^2. What the student does to many samples at once, and fast, is
        then held until the fake score has seen it, if the average is slow: from the first move on
        with `ema_warmup` = 1.
    """

    name = "dmd2"
    summary = "A student by DMD2 (distribution matching distillation, arXiv:2405.14867)"
    card_steps = property(lambda self: self.steps)

    steps: int = setting(4, WHOLE)
    time_shift: float | None = finite(None)
    time_start: float = share(1.0)
    inputs: str = choice("simulated", "noised")
    guidance_scales: tuple[float, ...] = scales(4.0)
    score_times: str = choice("uniform", "logit_normal")
    score_mean: float = finite(0.0)
    score_std: float = not_negative(1.0)
    score_shift: float = finite(0.0)
    score_from: float = share(0.02)
    score_to: float = share(0.98)
    added: float = not_negative(1e-6)
    fake_predicts: str = choice("velocity", "data")
    decoupled: bool = False
    divergence: str = choice("reverse_kl", *sorted({*adversarial.DIVERGENCES} - {"reverse_kl"}))
    follow: float = share(0.0)
    proximal: float = not_negative(0.0)

    def check_run(self, dtype: str) -> Iterable[str]:
        if self.divergence != "reverse_kl" and not self.gan_weight:
            raise ValueError(
                f"objective.divergence: {self.divergence!r} weighs by heads, and there are none;"
                " set gan_weight above 0, or divergence=reverse_kl"
            )
        return ()

    @property
    def sampled_by(self) -> Restart:
        return Restart(Shifted(self.time_shift, self.time_start))

    @property
    def players(self) -> dict[str, Player]:
        players = super().players
        return {**players, FAKE: players[FAKE]._replace(follows=self.follow)}

    def draw(self, key: jax.Array, batch: Batch) -> DMD2Draws:
        keys = jax.random.split(key, 8)
        shape, count = batch.x.shape, batch.x.shape[:1]
        scales = jnp.asarray(self.guidance_scales, jnp.float32)
        shape_of_times = self.score_mean, self.score_std, self.score_shift
        times = ScoreTimes(self.score_times, *shape_of_times, self.score_from, self.score_to)
        return DMD2Draws(
            draw_rollout(keys[0], batch, self.steps),
            jax.random.randint(keys[1], count, 0, self.steps),
            times.draw(keys[2], count),
            jax.random.normal(keys[3], shape),
            jax.random.choice(keys[4], scales, count),
            jax.random.uniform(keys[5], count),
            jax.random.normal(keys[6], shape),
            self.draw_heads(keys[7], batch, times),
        )

    def made(self, params: dict, batch: Batch, draws: DMD2Draws) -> Made:
        """The student's data, differentiable in the one step that makes them."""
        times = self.sampled_by.schedule.times(self.steps, batch.x.shape[1])
        if self.inputs == "simulated":
            x, t = self.rollout(params, batch, draws.rollout, times, draws.guidance)
        else:
            t = times[draws.index]
            x = interpolate(batch.x, draws.rollout.noise, t)
        return Made(self.data(params, x, t, batch.text, draws.guidance), t)

    def gradient(
        self, made: Made, view: View, batch: Batch, draws: DMD2Draws, weights: jax.Array | float = 1
    ) -> jax.Array:
        """g, (B, N, C), f-distill's weights (B, 1, 1) on the difference of the two scores."""
        x, given = jax.lax.stop_gradient(made.x), (batch.text, draws.guidance)
        x_t = interpolate(x, draws.noise, draws.t)
        fake = self.data(view.nets[FAKE], x_t, draws.t, *given)
        if not self.decoupled:
            real = self.real(view, x_t, draws.t, *given)
            return weights * score_difference(x, fake, real, added=self.added)
        real = self.real_of_both(view, x_t, draws.t, *given)[1]
        t = self.score_from + draws.share * jnp.maximum(made.t - self.score_from, 0)
        guided, plain = self.real_of_both(view, interpolate(x, draws.share_noise, t), t, *given)
        matched = weights * score_difference(x, fake, real, added=self.added)
        return matched + score_difference(x, plain, guided, added=self.added)

    def student_loss(
        self, own: dict, view: View, batch: Batch, draws: DMD2Draws, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del moves
        made = self.made(own, batch, draws)
        base = self.made(view.averages[STUDENT], batch, draws) if self.proximal else made
        metrics, weights, fooled = {}, 1.0, 0.0
        if self.gan_weight:
            x_t = interpolate(made.x, draws.noise, draws.t)
            logits = self.logits(view.nets[FAKE], view, x_t, draws.t, batch.text, draws.guidance)
            metrics["gan_loss"] = fooled = adversarial.generator_loss(logits)
            if self.divergence != "reverse_kl":
                weights = adversarial.divergence_weights(logits, draws.t, self.divergence)
                weights = per_sample(weights, x_t)
        gradient = self.gradient(base, view, batch, draws, weights)
        metrics["score_difference"] = jnp.sqrt(jnp.mean(jnp.square(gradient)))
        if self.proximal:
            away = jax.lax.stop_gradient(made.x - base.x)
            metrics["away"] = jnp.sqrt(jnp.mean(jnp.square(away)))
            gradient = away + self.proximal * gradient
        return jnp.mean(pulled(made.x, gradient)) / 2 + self.gan_weight * fooled, metrics

    def fake_loss(
        self, own: dict, view: View, batch: Batch, draws: DMD2Draws, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del moves
        student = (view.averages if self.proximal else view.nets)[STUDENT]
        x = jax.lax.stop_gradient(self.made(student, batch, draws).x)
        x_t = interpolate(x, draws.noise, draws.t)
        velocity = self.velocity(own, x_t, draws.t, batch.text, draws.guidance)
        loss = jnp.mean(velocity_loss(velocity, x, draws.noise, draws.t, self.fake_predicts))
        if not self.gan_weight:
            return loss, {}
        told, metrics = self.head_loss(own, view, x_t, draws.t, batch, draws.guidance, draws.heads)
        return loss + self.head_weight * told, {"velocity_loss": loss, **metrics}
