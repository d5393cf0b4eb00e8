"""Distribution matching: what the methods share that train a score of the student's own samples.

A second network, the fake score, learns the velocity of the student's samples as the teacher's is
that of data. Where the two predict different data for a noised sample, the difference says which
way its density should move. Source: DMD, arXiv:2311.18828; DMD2, arXiv:2405.14867.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_distill import flow, sampling
from jax_distill.flow import Batch, Network, Text, path_velocity, per_sample
from jax_distill.objectives.objective import STUDENT, Method, Player, View
from jax_distill.objectives.settings import Rule, choice, setting
from jax_distill.objectives.teacher import TeacherVelocity

FAKE = "fake"
WHOLE = Rule(lambda n: 1 <= n <= 10**4, "from 1 to 10000")


def mean_of_sample(x: jax.Array) -> jax.Array:
    """The mean over all axes but the first, (B, ...) -> (B, 1, ...)."""
    return jnp.mean(x, tuple(range(1, x.ndim)), keepdims=True)


def predicted_data(x_t: jax.Array, t: jax.Array, velocity: jax.Array) -> jax.Array:
    """The data ``x_t - t v`` that a velocity (B, ...) at time t (B,) points to, in float32."""
    dtype = jnp.promote_types(x_t.dtype, jnp.float32)
    return flow.straight_step(x_t.astype(dtype), t, jnp.zeros_like(t), velocity.astype(dtype))


def score_difference(
    x: jax.Array,
    fake: jax.Array,
    real: jax.Array,
    *,
    added: float = 0.0,
    least: float = 0.0,
    normalize: bool = True,
) -> jax.Array:
    """The gradient of distribution matching, (f - r) / mean |x - r|, a mean over each sample.

    Args:
      x: the student's data (B, ...).
      fake: f, what the fake score predicts of the noised x.
      real: r, what the teacher predicts, guidance included.
      added: to the divisor (1e-6 in FastGen).
      least: the divisor's lower bound (1e-5 in rCM).
      normalize: False for f - r alone.

    Returns:
      (B, ...), without gradient, zero where it would not be finite: to be descended along.

    Source: arXiv:2405.14867, equations 3 and 7 of its predecessor arXiv:2311.18828.
    """
    divisor = jnp.maximum(mean_of_sample(jnp.abs(x - real)), least) + added
    gradient = (fake - real) / divisor if normalize else fake - real
    return jax.lax.stop_gradient(jnp.nan_to_num(gradient, posinf=0.0, neginf=0.0))


def pulled(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """(x - sg(x - g))^2, element by element: its derivative by x is 2 g, its value g^2."""
    return jnp.square(x - jax.lax.stop_gradient(x - gradient))


def velocity_loss(
    velocity: jax.Array, x: jax.Array, noise: jax.Array, t: jax.Array, predicts: str = "velocity"
) -> jax.Array:
    """The error of a fake score's velocity at ``(1 - t) x + t e``, a mean a sample: (B,).

    Args:
      velocity: what it says (B, ...).
      x: the student's data.
      noise: e.
      t: (B,).
      predicts: whose square error: "velocity", or "data", which is t^2 times as much.
    """
    error = velocity.astype(jnp.promote_types(velocity.dtype, jnp.float32)) - path_velocity(
        x, noise
    )
    square = jnp.square(error if predicts == "velocity" else per_sample(t, error) * error)
    return jnp.mean(square, tuple(range(1, x.ndim)))


class ScoreTimes(NamedTuple):
    """The times that samples are noised to: moved by a shift, then within [low, high].

    Attributes:
      kind: "uniform" or "logit_normal".
      mean, std: of the latter, before the sigmoid.
      shift: mu of `flow.shift_time`.
      low, high: the times that 0 and 1 become.
    """

    kind: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 0.0
    low: float = 0.02
    high: float = 0.98

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if self.kind == "uniform":
            t = flow.uniform(key, shape)
        else:
            t = flow.logit_normal(key, shape, self.mean, self.std)
        return self.low + flow.shift_time(t, self.shift) * (self.high - self.low)


class RolloutDraws(NamedTuple):
    """What `Matching.rollout` takes."""

    noise: jax.Array  # (B, N, C), where it begins
    renoise: jax.Array  # (steps - 1, B, N, C)
    count: jax.Array  # (), steps before the last, which alone is differentiated


def draw_rollout(key: jax.Array, batch: Batch, steps: int) -> RolloutDraws:
    """Draws a rollout of 1 to `steps` steps, of one length for the whole batch."""
    key_noise, key_renoise, key_count = jax.random.split(key, 3)
    return RolloutDraws(
        jax.random.normal(key_noise, batch.x.shape),
        jax.random.normal(key_renoise, (steps - 1, *batch.x.shape)),
        jax.random.randint(key_count, (), 0, steps),
    )


@dataclasses.dataclass(frozen=True)
class Matching(Method):
    """The base of methods of a student and a fake score, which both start as the teacher.

    Attributes:
      network: of the student and of the fake score.
      teacher: the velocity that data have.
      student_every: N.
      cadence: "alternating", the student alone moves at every N-th step and the fake score at the
        others (FastGen, rCM); or "both", the fake score moves at each step, and the student before
        it at every N-th (DMD2).
    """

    network: Network
    teacher: TeacherVelocity
    student_every: int = setting(5, WHOLE)
    cadence: str = choice("alternating", "both")

    @property
    def players(self) -> dict[str, Player]:
        return {
            STUDENT: Player(self.student_loss, averaged=True),
            FAKE: Player(self.fake_loss, optimizer=FAKE),
        }

    def init(self, key: jax.Array, params: dict) -> dict[str, Any]:
        return {STUDENT: self.init_student(key, params), FAKE: {"network": params}}

    def turn(self, step: int) -> tuple[str, ...]:
        if step % self.student_every:
            return (FAKE,)
        if self.cadence == "both" or self.student_every == 1:
            return (STUDENT, FAKE)
        return (STUDENT,)

    def student_loss(
        self, own: dict, view: View, batch: Batch, draws: Any, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        raise NotImplementedError

    def fake_loss(
        self, own: dict, view: View, batch: Batch, draws: Any, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        raise NotImplementedError

    def velocity(
        self, params: dict, x: jax.Array, t: jax.Array, text: Text, guidance: jax.Array
    ) -> jax.Array:
        """Of the student's tree or the fake score's."""
        return self.network.velocity(params["network"], x, t, text, guidance)

    def data(
        self, params: dict, x: jax.Array, t: jax.Array, text: Text, guidance: jax.Array
    ) -> jax.Array:
        """The data that a tree predicts of x (B, N, C) at t (B,)."""
        return predicted_data(x, t, self.velocity(params, x, t, text, guidance))

    def real(
        self, view: View, x: jax.Array, t: jax.Array, text: Text, guidance: jax.Array
    ) -> jax.Array:
        """The data that the guided teacher predicts of x at t."""
        return predicted_data(x, t, self.teacher(view.frozen, x, t, text, guidance))

    def real_of_both(
        self, view: View, x: jax.Array, t: jax.Array, text: Text, guidance: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """As `real`, and what the teacher predicts without guidance."""
        guided, plain = self.teacher.both(view.frozen, x, t, text, guidance)
        return predicted_data(x, t, guided), predicted_data(x, t, plain)

    def motion(self, params: dict, null: Text | None = None) -> Callable[..., jax.Array]:
        """The map x - (t - s) net(x, t): to data for s = 0, an Euler step for others."""
        del null

        def jump(x, t, s, text, guidance):
            return flow.straight_step(x, t, s, self.velocity(params, x, t, text, guidance))

        return jump

    def rollout(
        self, params: dict, batch: Batch, draws: RolloutDraws, times: jax.Array, guidance: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The input (B, N, C) of the last step of a rollout by restarts, and its time (B,)."""
        jump = self.motion(jax.lax.stop_gradient(params))
        return sampling.rollout(
            jump, draws.noise, times, draws.count, draws.renoise, batch.text, guidance
        )
