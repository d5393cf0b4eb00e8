"""Students without a second time embedder, drawn by restarts or pushed forward.

They are those of distribution matching and of adversaries, whatever their losses; a method of them
is one line of `STUDENTS`. `FewStep` is a method that is nothing but its sampler.
"""

import dataclasses
import math
from collections.abc import Iterator

import pytest

from jax_distill.flow import Network, straight_step
from jax_distill.objectives.methods import KINDS, OBJECTIVES
from jax_distill.objectives.objective import Method
from jax_distill.objectives.settings import choice, finite, scales
from jax_distill.objectives.teacher import TeacherVelocity
from jax_distill.sampling import Listed, PushForward, Restart, Shifted


@dataclasses.dataclass(frozen=True)
class FewStep(Method):
    """A method of these tests, which trains nothing."""

    name = "few_step"
    summary = "A student of a test"

    network: Network
    teacher: TeacherVelocity
    kind: str = choice("restart", "push_forward")
    angles: tuple[float, ...] = scales(0.0)
    time_shift: float | None = finite(None)

    @property
    def card_steps(self):
        return 4 if self.kind == "restart" else 3

    @property
    def sampled_by(self):
        kind = Restart if self.kind == "restart" else PushForward
        listed = any(self.angles)
        return kind(Listed.of_angles(self.angles) if listed else Shifted(self.time_shift))

    def motion(self, params, null=None):
        def jump(x, t, s, text, guidance):
            velocity = self.network.velocity(params["network"], x, t, text, guidance)
            return straight_step(x, t, s, velocity)

        return jump


STUDENTS = {
    "restart": {"name": "few_step"},
    "restart_listed": {"name": "few_step", "angles": (math.pi / 2, 1.5, 1.4, 1.0)},
    "dmd2": {"name": "dmd2", "time_shift": 0.7, "time_start": 0.87},
    "tdm": {"name": "tdm", "steps": 3},
    "rcm": {"name": "rcm"},
    "sid": {"name": "sid", "steps": 4},
    "ladd": {"name": "ladd"},
    "sprint": {"name": "sprint"},
}
"""Settings of `config.objective`."""

STEPS = {"tdm": 3, "sprint": 2}
"""Of the cards of those that have not 4."""

SLOW = ("rcm", "sid", "ladd", "sprint")
NAMES = [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in STUDENTS]
"""The students as parameters of a test: a few of them stand for the others in quick runs."""


def card_sigmas(name: str) -> set[int]:
    """The numbers of steps, of 1, 2 and 4, whose sigmas diffusers must be given."""
    late = dict.fromkeys(("dmd2", "rcm"), {1, 2, 4})  # they begin below 1
    return (late | dict.fromkeys(("scm", "sprint", "restart_listed"), {4})).get(name, set())


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """Makes `FewStep` known, as a file among the objectives would be."""
    with pytest.MonkeyPatch.context() as patch:
        for known in (KINDS, OBJECTIVES):
            patch.setitem(known, FewStep.name, FewStep)
        yield
