"""The schedule of an exported student, for diffusers' Euler scheduler and in words.

In linear coordinates a restart from predicted data is the Euler scheduler's step with stochastic
sampling. A scheduler's config has one shift and no times: that of `Shifted` gives all its steps,
that of the others is where it moves 1/2 to their middle of two steps. What the folder's pipeline
does not walk by itself must be given to it as `sigmas`.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from jax_distill import flow
from jax_distill.interop.cards.card import Card
from jax_distill.interop.scheduler_config import EULER
from jax_distill.sampling import Angles, Listed, Restart, Shifted, uniform_times


def scheduler_config(card: Card) -> dict[str, Any]:
    """The scheduler_config.json with which stock `FluxPipeline` walks the schedule."""
    worlds = isinstance(card.sampler.schedule, Shifted) and start(card) == 1
    if card.scheduler is not None and worlds:
        config = dict(card.scheduler)
    else:
        config = {"_class_name": EULER, "num_train_timesteps": 1000, "shift": shift(card)}
    if restarts(card) or config.get("stochastic_sampling"):  # which may be that of a base
        config["stochastic_sampling"] = restarts(card)
    return config


def restarts(card: Card) -> bool:
    """Whether each step goes to data, and from there back with fresh noise."""
    return isinstance(card.sampler, Restart)


def start(card: Card) -> float:
    """The first time."""
    match card.sampler.schedule:
        case Shifted(start=time) | Listed((time, *_)):
            return time
    return 1.0


def mu(card: Card) -> float:
    """The shift at this resolution, for schedulers that shift by the number of tokens."""
    schedule = card.sampler.schedule
    return schedule.shift if isinstance(schedule, Shifted) else 0.0


def shift(card: Card) -> float:
    """The scheduler's s in t' = s t / (1 + (s - 1) t)."""
    match card.sampler.schedule:
        case Angles(middle):
            return math.tan(middle)
        case Listed((first, second, *_)):
            return second / (first - second)
    return math.exp(mu(card))


def needs_sigmas(card: Card, steps: int) -> bool:
    """Whether the folder's pipeline must be told the times of so many steps."""
    walked = flow.shift_time(uniform_times(steps), math.log(shift(card)))
    if card.interval_embeds:  # a flow map's pipeline starts there itself
        walked = start(card) * walked
    return not np.allclose(walked, card.sampler.schedule.times(steps, tokens=0), atol=1e-5)


def steps_with_sigmas(card: Card) -> Iterator[tuple[int, bool]]:
    """The usual numbers of steps, and the card's, each with what `needs_sigmas` says of it."""
    for steps in sorted({1, 2, 4, card.steps}):
        if steps <= card.sampler.schedule.most_steps:
            yield steps, needs_sigmas(card, steps)


def sigmas(card: Card, steps: int) -> list[float]:
    """The times of so many steps, (steps,), before the scheduler shifts them."""
    times = card.sampler.schedule.times(steps, tokens=0)  # its shift is already a number
    times = np.asarray(times, np.float64)[:-1]
    return (times / (shift(card) - (shift(card) - 1) * times)).round(6).tolist()


def words(card: Card) -> str:
    """The times of the sampler."""
    match card.sampler.schedule:
        case Angles(middle):
            text = f"TrigFlow's angles pi/2, {middle} and 0 at two steps,"
            text += " otherwise even from pi/2 to 0"
        case Listed(listed):
            times = ", ".join(f"{time:.6g}" for time in listed)
            text = f"the times {times}, of which fewer steps take the first ones; then 0"
        case _:
            text = "" if start(card) == 1 else f"{start(card)} times "
            text += "even times from 1 to 0, shifted: t' = e^mu / (e^mu + 1/t - 1) with"
            text += f" mu = {mu(card):.4g}"
            if scheduler_config(card).get("use_dynamic_shifting", False):
                text += " at this resolution"
    return text + ("; fresh noise each step" if restarts(card) else "")
