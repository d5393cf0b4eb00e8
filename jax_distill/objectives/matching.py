"""Distribution matching: what the methods share that train a score of the student's own samples.

A second network, the fake score, learns the velocity of the student's samples, as the teacher's is
that of data. Source: DMD, arXiv:2311.18828; DMD2, arXiv:2405.14867.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax

from jax_distill import flow, sampling
from jax_distill.flow import Batch, Network, Text
from jax_distill.objectives.objective import STUDENT, Method, Player, View
from jax_distill.objectives.scores import predicted_data
from jax_distill.objectives.settings import Rule, choice, setting
from jax_distill.objectives.teacher import TeacherVelocity

FAKE = "fake"
WHOLE = Rule(lambda n: 1 <= n <= 10**4, "from 1 to 10000")


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
      fake_first: whether the fake score moves before the student.
    """

    fake_first: ClassVar[bool] = False

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
            return (FAKE, STUDENT) if self.fake_first else (STUDENT, FAKE)
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
        return flow.velocity_map(self.network, params["network"])

    def rollout(
        self, params: dict, batch: Batch, draws: RolloutDraws, times: jax.Array, guidance: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The input (B, N, C) of the last step of a rollout by restarts, and its time (B,)."""
        jump = self.motion(jax.lax.stop_gradient(params))
        return sampling.rollout(
            jump, draws.noise, times, draws.count, draws.renoise, batch.text, guidance
        )
