"""Checks of networks' sizes and factors, before anything is allocated."""

import math
from collections.abc import Iterable
from typing import Any

from jax_distill.storage.quoting import shown

WIDEST = 2**16  # of any axis of a parameter but a vocabulary's
DEEPEST = 1000  # blocks
MOST_WORDS = 2**20  # of a vocabulary
LONGEST = 8192  # tokens of a caption


def check_size(name: str, value: Any, *, least: int = 1, most: int = WIDEST) -> None:
    """Raises ValueError when a value is no whole number between two others, both included."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name}: {shown(value)} is not an integer of at least {least}")
    if value > most:
        raise ValueError(f"{name}: {shown(value)} is more than {most}, which no such network has")


def check_sizes(config: Any, names: Iterable[str]) -> None:
    """Checks that fields of a configuration are integers of a plausible size.

    Raises:
      ValueError: names the first field that is not.
    """
    most = {"vocab_size": MOST_WORDS, "num_layers": DEEPEST, "num_hidden_layers": DEEPEST}
    for name in names:
        check_size(name, getattr(config, name), most=most.get(name, WIDEST))


def check_positive(config: Any, names: Iterable[str]) -> None:
    """Checks that fields of a configuration are positive and finite.

    Raises:
      ValueError: names the first field that is not.
    """
    for name in names:
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < 1e30 or not math.isfinite(value):
            raise ValueError(f"{name}: {shown(value)} is not a positive number")


def check_flags(config: Any, names: Iterable[str]) -> None:
    """Checks that fields of a configuration are true or false.

    Raises:
      ValueError: names the first field that is not.
    """
    for name in names:
        if not isinstance(value := getattr(config, name), bool):
            raise ValueError(f"{name}: {shown(value)} is neither true nor false")


def checked_sequence(name: str, value: Any, *, longest: int) -> tuple[Any, ...]:
    """A list as a tuple; raises ValueError when it is something else, empty or too long."""
    if not isinstance(value, list | tuple) or not 0 < len(value) <= longest:
        raise ValueError(f"{name}: {shown(value)} is not a list of 1 to {longest} numbers")
    return tuple(value)
