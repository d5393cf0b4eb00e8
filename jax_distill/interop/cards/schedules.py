"""The schedule of an exported student, for diffusers' Euler scheduler and in words.

In linear coordinates a restart from predicted data is the Euler scheduler's step with stochastic
sampling. The middle of `Angles` is where the scheduler's shift moves 1/2 to, so that one and two
steps are those of the sampler; other steps need `sigmas`.
"""

import math
from typing import Any

import numpy as np

from jax_distill.interop.cards.card import Card
from jax_distill.interop.scheduler_config import EULER
from jax_distill.sampling import Angles, Restart


def scheduler_config(card: Card) -> dict[str, Any]:
    """The scheduler_config.json with which stock `FluxPipeline` walks the schedule."""
    if card.scheduler is not None and start(card) == 1 and not in_angles(card):
        config = dict(card.scheduler)
    else:
        config = {"_class_name": EULER, "num_train_timesteps": 1000, "shift": shift(card)}
    return config | ({"stochastic_sampling": True} if restarts(card) else {})


def restarts(card: Card) -> bool:
    """Whether each step goes to data, and from there back with fresh noise."""
    return isinstance(card.sampler, Restart)


def in_angles(card: Card) -> bool:
    """Whether the schedule is even in TrigFlow's angles instead of the time."""
    return isinstance(card.sampler.schedule, Angles)


def start(card: Card) -> float:
    """The first time."""
    return 1.0 if in_angles(card) else card.sampler.schedule.start


def mu(card: Card) -> float:
    """The shift at this resolution, for schedulers that shift by the number of tokens."""
    return 0.0 if in_angles(card) else card.sampler.schedule.shift


def shift(card: Card) -> float:
    """The scheduler's s in t' = s t / (1 + (s - 1) t)."""
    return math.tan(card.sampler.schedule.middle) if in_angles(card) else math.exp(mu(card))


def needs_sigmas(card: Card) -> bool:
    """Whether the folder's pipeline must be told the times of the card's number of steps."""
    late = start(card) < 1 and not card.interval_embeds  # a flow map's pipeline starts there itself
    return late or (in_angles(card) and card.steps > 2)


def sigmas(card: Card, steps: int) -> list[float]:
    """The times of so many steps, (steps,), before the scheduler shifts them."""
    times = card.sampler.schedule.times(steps, tokens=0)  # its shift is already a number
    times = np.asarray(times, np.float64)[:-1]
    return (times / (shift(card) - (shift(card) - 1) * times)).round(6).tolist()


def words(card: Card) -> str:
    """The times of the sampler."""
    if in_angles(card):
        middle = card.sampler.schedule.middle
        text = f"TrigFlow's angles pi/2, {middle} and 0 at two steps, otherwise even from pi/2 to 0"
    else:
        text = "" if start(card) == 1 else f"{start(card)} times "
        text += "even times from 1 to 0, shifted: t' = e^mu / (e^mu + 1/t - 1) with"
        text += f" mu = {mu(card):.4g}"
        if scheduler_config(card).get("use_dynamic_shifting", False):
            text += " at this resolution"
    return text + ("; fresh noise each step" if restarts(card) else "")
