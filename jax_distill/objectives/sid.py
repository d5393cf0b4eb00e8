"""SiD: score identity distillation, data-free, in the coordinates of rectified flow.

Source: Zhou et al., arXiv:2404.04057; with guidance, arXiv:2406.01561; along the straight path,
arXiv:2509.25127.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Batch, guided_velocity, interpolate, uniform
from jax_distill.objectives.matching import FAKE, WHOLE, Matching, RolloutDraws, draw_rollout
from jax_distill.objectives.objective import STUDENT, View, drop_text
from jax_distill.objectives.scores import mean_of_sample, predicted_data, velocity_loss
from jax_distill.objectives.settings import choice, finite, positive, scales, setting, share
from jax_distill.sampling import Restart, Shifted


class Noised(NamedTuple):
    """How one player's samples are made, and noised."""

    rollout: RolloutDraws
    t: jax.Array  # (B,), tau
    noise: jax.Array  # (B, N, C)


class SiDDraws(NamedTuple):
    guidance: jax.Array  # (B,)
    dropped: jax.Array  # (B,) bool: the fake score learns from the null caption
    student: Noised
    fake: Noised


def sid_loss(
    x: jax.Array, fake: jax.Array, real: jax.Array, *, alpha: float = 1.0, least: float = 1e-5
) -> jax.Array:
    """The sum over a sample of (r - f) ((r - x) - alpha (r - f)) / w: (B,).

    Args:
      x: the student's data (B, ...).
      fake: f, what the fake score predicts of the noised x, differentiable by it.
      real: r, what the teacher predicts, likewise.
      alpha: 1 leaves (r - f) (f - x).
      least: the lower bound of w = mean |x - r|, a mean over the sample without gradient.

    Source: arXiv:2404.04057, equation 23.
    """
    divisor = jax.lax.stop_gradient(jnp.maximum(mean_of_sample(jnp.abs(x - real)), least))
    difference = real - fake
    terms = difference * ((real - x) - alpha * difference) / divisor
    return jnp.sum(terms, tuple(range(1, x.ndim)))


@jax.custom_vjp
def with_finite_gradient(x: jax.Array) -> jax.Array:
    """x, whose gradient has zeros where it would not be finite."""
    return x


with_finite_gradient.defvjp(
    lambda x: (x, None),
    lambda _, gradient: (jnp.nan_to_num(gradient, posinf=0.0, neginf=0.0),),
)


@dataclasses.dataclass(frozen=True)
class SiD(Matching):
    """Score identity distillation, of one step or of a few with restarts.

    The student's data x are noised to x_t, of which the teacher under guidance predicts r and the
    fake score f. The student descends along `sid_loss`, through x_t and both frozen networks. The
    fake score learns the velocity v at x_t of samples that are drawn for it:

      sum (1 - t)^2 (v - (e - x))^2,

    the error of its noise. Both move at each step, the fake score first. Data are not read.

    The fake score may be guided, f_null + k (f - f_null), as it learns and as it is compared; some
    of the samples that it learns are then drawn and shown with the null caption.

    Attributes:
      steps: of the student; their number in a rollout is drawn.
      time_shift: mu of the sampler's times; None: the world's, or FLUX's for so many tokens.
      time_start: where they begin, see `DMD2`.
      guidance_scales: of the teacher (kappa_4), drawn uniformly; the two players embed it.
      learned_scale: k as the fake score learns (kappa_1).
      compared_scale: k in the student's loss (kappa_2 and kappa_3); with 1 for both, no guidance.
      drop_rate: share of null captions among those samples, under guidance.
      score_from, score_to: tau is uniform between them.
      alpha, least_error: see `sid_loss`, the latter of w.
      fake_predicts: "noise", as above, or "velocity", without (1 - t)^2.
    """

    name = "sid"
    summary = "A student by SiD (score identity distillation, arXiv:2404.04057)"
    card_steps = property(lambda self: self.steps)
    fake_first = True

    student_every: int = setting(1, WHOLE)
    steps: int = setting(1, WHOLE)
    time_shift: float | None = finite(None)
    time_start: float = share(1.0)
    guidance_scales: tuple[float, ...] = scales(2.0)
    learned_scale: float = finite(2.0)
    compared_scale: float = finite(2.0)
    drop_rate: float = share(0.1)
    score_from: float = share(0.02)
    score_to: float = share(0.98)
    alpha: float = finite(1.0)
    least_error: float = positive(1e-5)
    fake_predicts: str = choice("noise", "velocity")

    def check_run(self, dtype: str) -> Iterable[str]:
        if self.score_from >= self.score_to:
            raise ValueError(
                f"objective.score_from: {self.score_from} is not before score_to, {self.score_to}"
            )
        if self.fake_is_guided and self.drop_rate == 0:
            raise ValueError(
                "objective.drop_rate: 0 trains no null caption, which the fake score is guided away"
                " from; set 0.1, or learned_scale and compared_scale to 1"
            )
        return ()

    @property
    def fake_is_guided(self) -> bool:
        return (self.learned_scale, self.compared_scale) != (1.0, 1.0)

    @property
    def sampled_by(self) -> Restart:
        return Restart(Shifted(self.time_shift, self.time_start))

    def draw(self, key: jax.Array, batch: Batch) -> SiDDraws:
        key_guidance, key_drop, *keys = jax.random.split(key, 4)
        count = batch.x.shape[:1]
        return SiDDraws(
            jax.random.choice(key_guidance, jnp.asarray(self.guidance_scales, jnp.float32), count),
            jax.random.bernoulli(key_drop, self.drop_rate if self.fake_is_guided else 0.0, count),
            *(self.noised(key, batch) for key in keys),
        )

    def noised(self, key: jax.Array, batch: Batch) -> Noised:
        """Draws of one player."""
        key_rollout, key_t, key_noise = jax.random.split(key, 3)
        return Noised(
            draw_rollout(key_rollout, batch, self.steps),
            uniform(key_t, batch.x.shape[:1], self.score_from, self.score_to),
            jax.random.normal(key_noise, batch.x.shape),
        )

    def made(self, params: dict, batch: Batch, draws: Noised, guidance: jax.Array) -> jax.Array:
        """The student's data (B, N, C), differentiable in their last step."""
        times = self.sampled_by.schedule.times(self.steps, batch.x.shape[1])
        x, t = self.rollout(params, batch, draws.rollout, times, guidance)
        return self.data(params, x, t, batch.text, guidance)

    def guided(
        self, params: dict, view: View, x: jax.Array, t: jax.Array, given: tuple, scale: float
    ) -> jax.Array:
        """The fake score's velocity of x at t, given (text, guidance), guided by `scale`."""
        if scale == 1:
            return self.velocity(params, x, t, *given)
        text, embedded = given
        null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), view.frozen["null"], text)
        one, other = (x, t, text, embedded), (x, t, null, embedded)
        twice = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, other)
        return guided_velocity(*jnp.split(self.velocity(params, *twice), 2), scale)

    def student_loss(
        self, own: dict, view: View, batch: Batch, draws: SiDDraws, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        made, given = draws.student, (batch.text, draws.guidance)
        x = with_finite_gradient(self.made(own, batch, made, draws.guidance))
        at = interpolate(x, made.noise, made.t), made.t
        velocity = self.guided(view.nets[FAKE], view, *at, given, self.compared_scale)
        fake, real = predicted_data(*at, velocity), self.real(view, *at, *given)
        loss = sid_loss(x, fake, real, alpha=self.alpha, least=self.least_error)
        found = jnp.sqrt(jnp.mean(jnp.square(real - fake)))
        return jnp.mean(loss, where=jnp.isfinite(loss)), {"score_difference": found}

    def fake_loss(
        self, own: dict, view: View, batch: Batch, draws: SiDDraws, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        made = draws.fake
        text = drop_text(batch.text, view.frozen["null"], draws.dropped)
        batch, given = batch._replace(text=text), (text, draws.guidance)
        x = jax.lax.stop_gradient(self.made(view.nets[STUDENT], batch, made, draws.guidance))
        x_t = interpolate(x, made.noise, made.t)
        velocity = self.guided(own, view, x_t, made.t, given, self.learned_scale)
        loss = velocity_loss(velocity, x, made.noise, made.t)
        weight = jnp.square(1 - made.t) if self.fake_predicts == "noise" else 1.0
        return jnp.mean(weight * loss) * x[0].size, {}
