"""The settings of an objective: dataclass fields that say what values they may have."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A condition on a value.

    Attributes:
      holds: of values of the default's type.
      words: that follow "is not" in an error.
    """

    holds: Callable[[Any], bool]
    words: str


def setting(default: Any, *rules: Rule) -> Any:
    """A dataclass field with a default, whose values are checked."""
    return dataclasses.field(default=default, metadata={"rules": rules})


def positive(default: float, most: float = math.inf) -> Any:
    """A number above zero, and no larger than `most`."""
    return setting(default, Rule(lambda x: 0 < x < math.inf, "positive"), *_at_most(most))


def not_negative(default: float, most: float = math.inf) -> Any:
    """A number of zero or more, and no larger than `most`."""
    return setting(default, Rule(lambda x: 0 <= x < math.inf, "zero or more"), *_at_most(most))


def steps(default: int) -> Any:
    """A number of steps; 0 for none."""
    return not_negative(default, 2**31 - 1)


def share(default: float) -> Any:
    """A number from 0 to 1."""
    return setting(default, Rule(lambda x: 0 <= x <= 1, "from 0 to 1"))


def finite(default: float | None) -> Any:
    """A finite number; a default of None waits for one."""
    return setting(default, Rule(math.isfinite, "a finite number"))


def scales(*default: float) -> Any:
    """Guidance scales that are drawn."""
    holds = Rule(lambda x: x and all(map(math.isfinite, x)), "a list of finite numbers")
    return setting(default, holds)


def choice(*words: str) -> Any:
    """One of a few words, the first by default."""
    return setting(words[0], Rule(words.__contains__, f"one of {', '.join(words)}"))


def _at_most(most: float) -> Iterator[Rule]:
    if most < math.inf:
        yield Rule(lambda x: x <= most, f"{most} or less")


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
