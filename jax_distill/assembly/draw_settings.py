"""Requests to a pipeline, checked before anything is read or computed for them."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_distill.assembly import build
from jax_distill.config.rules import MOST_STEPS
from jax_distill.models import finite
from jax_distill.sampling import check_steps
from jax_distill.streams import whole_number


def captions(prompts: Any) -> tuple[str, ...]:
    """One caption or several, as a tuple.

    Raises:
      ValueError: there is none, or one of them is no text.
    """
    if isinstance(prompts, str):
        prompts = (prompts,)
    try:
        prompts = tuple(prompts)
    except TypeError:
        raise ValueError(f"prompts: {prompts!r} is neither a caption nor a list of them") from None
    if not prompts:
        raise ValueError("prompts: none given; pass one caption or more")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts: number {index} is {prompt!r}, which is no text")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"prompts: {prompt!r} is not UTF-8 text") from None
    return prompts


def steps(value: Any, config: ConfigDict | None = None) -> int:
    """The number of sampling steps.

    Args:
      value: as it was given.
      config: of the network, if it is known yet.

    Raises:
      ValueError: it is no whole number from 1 to `MOST_STEPS`, or the network's schedule has fewer.
    """
    number = whole_number("steps", value, 1, MOST_STEPS)
    if config is not None:
        check_steps(build.without_networks(config).sampled_by.schedule, number)
    return number


def resolution(height: Any, width: Any, default: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels; None is the default's.

    Raises:
      ValueError: one is no multiple of 16 pixels, or too large.
    """
    given = zip(("height", "width"), (height, width), default)
    size = tuple(
        std if value is None else whole_number(name, value, 1) for name, value, std in given
    )
    build.token_grid(size)
    return size


def guidance(value: Any, config: ConfigDict) -> float:
    """The guidance scale to draw with; None is the configuration's.

    Raises:
      ValueError: it is no finite number of zero or more; or one is given, and the network takes
        none: any number would change nothing.
    """
    takes = build.takes_guidance(config)
    if value is None:
        name, value = "evaluation.guidance", config.evaluation.guidance
    elif takes:
        name = "guidance"
    else:
        raise ValueError(
            f"guidance: {value!r} would change nothing, the network of {config.name!r} takes no"
            " guidance scale and is drawn from without classifier-free guidance; leave it out"
        )
    number = _real(value)
    if takes and not 0 <= number <= float(np.finfo(np.float32).max):
        raise ValueError(f"{name}: {value!r} is not a finite number of zero or more")
    return number


def _real(value: Any) -> float:
    """A number as a float; NaN for what is none."""
    if isinstance(value, bool | str | bytes) or np.ndim(value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def noise(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Noise that is given in the place of the seed's, as float32.

    Raises:
      ValueError: it is of another shape, of no type of floats, or not finite.
    """
    array = np.asarray(value)
    if array.shape != shape:
        raise ValueError(f"noise: shape {array.shape} where {shape} is needed")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"noise: of type {array.dtype}; give float32, of a standard deviation of 1"
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if bad := finite.bad_rows(array):
        raise ValueError(f"noise: row {bad[0]} is not finite in float32")
    return array
