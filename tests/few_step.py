"""Students without a second time embedder, drawn by restarts or pushed forward.

They are those of distribution matching and of adversaries, whatever their losses; a method of them
is one line of `STUDENTS`.
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
    "restart_shifted": {"name": "few_step", "time_shift": 0.7},
    "restart_listed": {"name": "few_step", "angles": (math.pi / 2, 1.5, 1.4, 1.0)},
    "push_forward": {"name": "few_step", "kind": "push_forward"},
}
"""Settings of `config.objective`."""


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """Makes `FewStep` known, as a file among the objectives would be."""
    with pytest.MonkeyPatch.context() as patch:
        for known in (KINDS, OBJECTIVES):
            patch.setitem(known, FewStep.name, FewStep)
        yield
