"""diffusers' scheduler walks the schedule of any sampler, whatever method it is of."""

import dataclasses

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from test_hostile_cards import BENIGN

from jax_distill.interop.cards import programs, schedules
from jax_distill.sampling import Angles, PushForward, Restart, Shifted, Solve

SAMPLERS = [
    Restart(Angles(1.3)),
    PushForward(Angles(1.1)),
    PushForward(Shifted(0.4)),
    Restart(Shifted(0.3, 0.9)),
    PushForward(Shifted(0.0, 0.994)),
    Solve(Shifted(0.7)),
]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_exported_scheduler_walks_the_schedule(sampler, steps):
    card = dataclasses.replace(BENIGN, method="new", sampler=sampler, steps=steps)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(schedules.scheduler_config(card))
    assert scheduler.config.stochastic_sampling == isinstance(sampler, Restart)
    given = schedules.sigmas(card, steps)
    even = [1 - step / steps for step in range(steps)]
    assert schedules.needs_sigmas(card) == (not np.allclose(given, even, atol=1e-5))
    scheduler.set_timesteps(sigmas=given, mu=schedules.mu(card))
    expected = sampler.schedule.times(steps, tokens=0)
    np.testing.assert_allclose(scheduler.sigmas, expected, atol=2e-6)
    asked = f"sigmas={given}," in programs.program(card)
    assert asked == schedules.needs_sigmas(card)
