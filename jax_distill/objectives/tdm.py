"""TDM: trajectory distribution matching, data-free, in the coordinates of rectified flow.

Source: Luo et al., arXiv:2503.06674, whose path of preserved variance becomes the straight one.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Batch, per_sample, straight_step, uniform
from jax_distill.objectives.matching import FAKE, WHOLE, Matching
from jax_distill.objectives.objective import STUDENT, View
from jax_distill.objectives.scores import mean_of_sample, predicted_data, score_difference
from jax_distill.objectives.settings import choice, finite, positive, scales, setting, share
from jax_distill.sampling import PushForward, Shifted


class Points(NamedTuple):
    """The times and the noise of one player's move."""

    step: jax.Array  # (B,), of the sampler's, from 0: the one that starts at t_k
    start: jax.Array  # (B,), t_k
    end: jax.Array  # (B,), t_m
    t: jax.Array  # (B,), tau, at least `end`
    noise: jax.Array  # (B, N, C), e


class TDMDraws(NamedTuple):
    noise: jax.Array  # (B, N, C), where the walk begins
    guidance: jax.Array  # (B,)
    student: Points
    fake: Points


def renoising(m: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The factors of ``x_t = c x_m + s e``, which has the marginal of time t >= m, m below 1.

    c = (1 - t) / (1 - m), s^2 = t^2 - (c m)^2, as a product, which cannot become negative.
    """
    kept = (1 - t) / (1 - m)
    return kept, jnp.sqrt((t - m) / (1 - m) * (t + kept * m))


def renoised(x_m: jax.Array, noise: jax.Array, m: jax.Array, t: jax.Array) -> jax.Array:
    """Moves x_m (B, ...) from time m (B,) up to t (B,) with fresh noise, see `renoising`."""
    kept, added = (per_sample(factor, x_m) for factor in renoising(m, t))
    return kept * x_m + added * noise


def mixed_noise(predicted: jax.Array, noise: jax.Array, m: jax.Array, t: jax.Array) -> jax.Array:
    """The noise (x_t - (1 - t) x_0) / t of a `renoised` x_m = (1 - m) x_0 + m predicted."""
    kept, added = (per_sample(factor, noise) for factor in renoising(m, t))
    return (kept * per_sample(m, noise) * predicted + added * noise) / per_sample(t, noise)


def importance(mixed: jax.Array, noise: jax.Array) -> jax.Array:
    """(B,): ``exp(-mean mixed^2 / 2) / exp(-mean noise^2 / 2)``, means over a sample."""
    difference = jnp.square(noise) - jnp.square(mixed)
    return jnp.exp(jnp.mean(difference, tuple(range(1, noise.ndim))) / 2)


def pseudo_huber(error: jax.Array, constant: float) -> jax.Array:
    """sqrt(d^2 + c^2) - c, element by element."""
    return jnp.sqrt(jnp.square(error) + constant**2) - constant


@dataclasses.dataclass(frozen=True)
class TDM(Matching):
    """Trajectory distribution matching, at the end of each of the student's steps.

    The student is an Euler sampler of `steps` steps. It walks without gradient from noise, and of
    the inputs of its steps one a sample, z at t_k, is drawn. From z it predicts data x and noise,
    and so x_m at t_m, the end of the step. x_m, not x, is noised on, to tau in [t_m, t_k], where
    the teacher, under guidance, predicts r and the fake score f. With means over a sample,

      student:  mean huber(x - sg(x + r - f)) / mean |x - r|,    huber(d) = sqrt(d^2 + c^2) - c
      fake:     mean (f - sg(x))^2 min(SNR(tau), s) iw,          see `importance`.

    Both move at each step, the fake score first. Data are not read.

    Attributes:
      steps, time_shift: K, and mu of its times; None: the world's, or FLUX's for so many tokens.
      guidance_scales: of the teacher, drawn uniformly; the student and the fake score embed it.
      step_end: "end", t_m is where the next step begins, or "inside", drawn within the step, at
        least twice the margin below t_k.
      separate: False lets tau go on to 1.
      least_time, time_margin: of tau, and from tau to t_k (or 1): 20 and 10 of 1000 as published.
      distance: "huber", or "mse", d^2.
      huber_constant, snr_cap: c and s. Differences far above c count by their signs, and draw the
        student to medians: in one step, all but a mode may be lost.
    """

    name = "tdm"
    summary = "A student by TDM (trajectory distribution matching, arXiv:2503.06674)"
    card_steps = property(lambda self: self.steps)
    fake_first = True

    student_every: int = setting(1, WHOLE)
    steps: int = setting(4, WHOLE)
    time_shift: float | None = finite(None)
    guidance_scales: tuple[float, ...] = scales(4.5)
    step_end: str = choice("end", "inside")
    separate: bool = True
    least_time: float = share(0.02)
    time_margin: float = share(0.01)
    distance: str = choice("huber", "mse")
    huber_constant: float = positive(1e-3)
    snr_cap: float = positive(5.0)

    @property
    def sampled_by(self) -> PushForward:
        return PushForward(Shifted(self.time_shift))

    def draw(self, key: jax.Array, batch: Batch) -> TDMDraws:
        key_noise, key_guidance, *keys = jax.random.split(key, 4)
        scales = jnp.asarray(self.guidance_scales, jnp.float32)
        return TDMDraws(
            jax.random.normal(key_noise, batch.x.shape),
            jax.random.choice(key_guidance, scales, batch.x.shape[:1]),
            *(self.points(key, batch) for key in keys),
        )

    def times(self, batch: Batch) -> jax.Array:
        """(steps + 1,), those that the student is sampled at."""
        return self.sampled_by.schedule.times(self.steps, batch.x.shape[1])

    def points(self, key: jax.Array, batch: Batch) -> Points:
        """Draws where a player moves."""
        key_step, key_end, key_t, key_noise = jax.random.split(key, 4)
        count, times = batch.x.shape[:1], self.times(batch)
        step = jax.random.randint(key_step, count, 0, self.steps)
        start, end = times[step], times[step + 1]
        if self.step_end == "inside":
            room = jnp.maximum(start - 2 * self.time_margin - end, 0)
            end += room * uniform(key_end, count)
        low = jnp.maximum(end, self.least_time)
        high = (start if self.separate else times[0]) - self.time_margin
        t = low + jnp.maximum(high - low, 0) * uniform(key_t, count)
        return Points(step, start, end, t, jax.random.normal(key_noise, batch.x.shape))

    def inputs(self, params: dict, batch: Batch, draws: TDMDraws, step: jax.Array) -> jax.Array:
        """The inputs (B, N, C) of the chosen steps (B,) of the sampler's walk, no gradient."""
        move, times = self.motion(jax.lax.stop_gradient(params)), self.times(batch)

        def advance(walk, inputs):
            x, kept = walk
            index, *ends = inputs
            ends = (jnp.full(step.shape, time) for time in ends)
            x = move(x, *ends, batch.text, draws.guidance)
            return (x, jnp.where(per_sample(step == index, x), x, kept)), None

        scanned = jnp.arange(1, self.steps), times[:-2], times[1:-1]
        (_, kept), _ = jax.lax.scan(advance, (draws.noise, draws.noise), scanned)
        return jax.lax.stop_gradient(kept)

    def made(
        self, params: dict, batch: Batch, draws: TDMDraws, points: Points
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the student predicts of data and of noise, and x_m, differentiable in one step."""
        z, t = self.inputs(params, batch, draws, points.step), points.start
        velocity = self.velocity(params, z, t, batch.text, draws.guidance)
        noise = straight_step(z, t, jnp.ones_like(t), velocity)
        return predicted_data(z, t, velocity), noise, straight_step(z, t, points.end, velocity)

    def student_loss(
        self, own: dict, view: View, batch: Batch, draws: TDMDraws, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        points = draws.student
        x, _, x_m = self.made(own, batch, draws, points)
        x_t = jax.lax.stop_gradient(renoised(x_m, points.noise, points.end, points.t))
        at = x_t, points.t, batch.text, draws.guidance
        fake, real = self.data(view.nets[FAKE], *at), self.real(view, *at)
        gradient = score_difference(x, fake, real, normalize=False)
        weight = jax.lax.stop_gradient(1 / mean_of_sample(jnp.abs(x - real)))
        error = gradient + (x - jax.lax.stop_gradient(x))
        huber = self.distance == "huber"
        distance = pseudo_huber(error, self.huber_constant) if huber else jnp.square(error)
        metrics = {"score_difference": jnp.sqrt(jnp.mean(jnp.square(gradient)))}
        return jnp.mean(weight * distance), metrics

    def fake_loss(
        self, own: dict, view: View, batch: Batch, draws: TDMDraws, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        points = draws.fake
        x, noise, x_m = self.made(view.nets[STUDENT], batch, draws, points)
        x_t = renoised(x_m, points.noise, points.end, points.t)
        predicted = self.data(own, x_t, points.t, batch.text, draws.guidance)
        mixed = mixed_noise(noise, points.noise, points.end, points.t)
        weight = importance(mixed, points.noise)
        square = jnp.mean(jnp.square(predicted - x), tuple(range(1, predicted.ndim)))
        snr = jnp.minimum(jnp.square((1 - points.t) / points.t), self.snr_cap)
        return jnp.mean(weight * snr * square), {"importance": jnp.mean(weight)}
