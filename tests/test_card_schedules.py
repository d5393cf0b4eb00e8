"""diffusers' scheduler walks the schedule of any sampler, whatever method it is of."""

import dataclasses
import math

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from test_hostile_cards import BENIGN

from jax_distill.interop.cards import programs, schedules
from jax_distill.interop.scheduler_config import FLUX_DEV
from jax_distill.sampling import Angles, Listed, PushForward, Restart, Shifted, Solve

SAMPLERS = [
    Restart(Angles(1.3)),
    PushForward(Angles(1.1)),
    PushForward(Shifted(0.4)),
    Restart(Shifted(0.3, 0.9)),
    PushForward(Shifted(0.0, 0.994)),
    Solve(Shifted(0.7)),
    Restart(Listed.of_angles((math.pi / 2, 1.5, 1.4, 1.0))),
    PushForward(Listed((0.98, 0.9, 0.5, 0.2))),
]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_exported_scheduler_walks_the_schedule(sampler, steps):
    card = dataclasses.replace(BENIGN, method="new", sampler=sampler, steps=steps)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(schedules.scheduler_config(card))
    assert scheduler.config.stochastic_sampling == isinstance(sampler, Restart)
    given = schedules.sigmas(card, steps)
    even = [1 - step / steps for step in range(steps)]
    assert schedules.needs_sigmas(card, steps) == (not np.allclose(given, even, atol=1e-5))
    scheduler.set_timesteps(sigmas=given, mu=schedules.mu(card))
    expected = sampler.schedule.times(steps, tokens=0)
    np.testing.assert_allclose(scheduler.sigmas, expected, atol=2e-6)
    asked = f"sigmas={given}," in programs.program(card)
    assert asked == schedules.needs_sigmas(card, steps)


def test_a_card_has_no_more_sigmas_than_listed_times():
    card = dataclasses.replace(BENIGN, sampler=Restart(Listed((1.0, 0.4))), steps=2)
    assert dict(schedules.steps_with_sigmas(card)) == {1: False, 2: False}
    with pytest.raises(ValueError, match="^steps: 4 are more than the 2 times that the network"):
        schedules.sigmas(card, 4)
    assert "the times 1, 0.4, of which fewer" in schedules.words(card)


@pytest.mark.parametrize("kind", [PushForward, Restart])
def test_a_schedule_of_the_world_leaves_the_kind_to_the_method(kind):
    for theirs in ({}, {"stochastic_sampling": False}, {"stochastic_sampling": True}):
        scheduler = FLUX_DEV | theirs
        card = dataclasses.replace(BENIGN, sampler=kind(Shifted(0.6)), scheduler=scheduler)
        config = schedules.scheduler_config(card)
        assert config.pop("stochastic_sampling", False) == (kind is Restart)
        assert config == FLUX_DEV
