"""The settings of an objective: dataclass fields that say what values they may have."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What must hold of a value.

    Attributes:
      holds: of values of the default's type.
      words: that follow "is not" in an error.
    """

    holds: Callable[[Any], bool]
    words: str


POSITIVE = Rule(lambda value: 0 < value < math.inf, "positive")
NOT_NEGATIVE = Rule(lambda value: 0 <= value < math.inf, "zero or more")
SHARE = Rule(lambda value: 0 <= value <= 1, "from 0 to 1")
FINITE = Rule(math.isfinite, "a finite number")
SCALES = Rule(lambda value: value and all(map(math.isfinite, value)), "a list of finite numbers")


def at_most(most: int) -> Rule:
    return Rule(lambda value: value <= most, f"{most} or less")


def one_of(*words: str) -> Rule:
    return Rule(words.__contains__, f"one of {', '.join(words)}")


STEPS = at_most(2**31 - 1)


def setting(default: Any, *rules: Rule) -> Any:
    """A dataclass field with a default, whose values are checked."""
    return dataclasses.field(default=default, metadata={"rules": rules})


def settings_of(kind: type) -> dict[str, Any]:
    """The settings of an objective and their defaults; networks and encoders are not settings."""
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def rules_of(kind: type) -> Iterator[tuple[str, Rule]]:
    """The names of an objective's settings with each of their rules."""
    for field in dataclasses.fields(kind):
        for rule in field.metadata.get("rules", ()):
            yield field.name, rule


def check(objective: Any) -> None:
    """Checks the values of an objective's settings.

    Raises:
      ValueError: naming the setting, its value, and what it must be.
    """
    for name, rule in rules_of(type(objective)):
        value = getattr(objective, name)
        if value is not None and not rule.holds(value):
            raise ValueError(f"objective.{name}: {value!r} is not {rule.words}")
