"""Checks of whole configurations: names, types and ranges of all settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_distill.config import rules
from jax_distill.config.defaults import base
from jax_distill.config.settings import ConfigError, check_keys, flatten
from jax_distill.objectives.methods import KINDS
from jax_distill.objectives.settings import rules_of, settings_of
from jax_distill.storage.quoting import shown


def check(values: Mapping[str, Any], partial: Sequence[str] = ()) -> None:
    """Checks names, types and ranges of all settings.

    Args:
      values: of a configuration, nested.
      partial: sections of which some keys may be missing.

    Raises:
      ConfigError: naming the key, its value, and what it must be.
    """
    objective = values.get("objective")
    if not isinstance(objective, Mapping) or not isinstance(objective.get("name"), str):
        raise ConfigError(f"objective: {shown(objective)} must be a section that has a name")
    given, known = dict(values), base().to_dict()
    given.pop("objective"), known.pop("objective")
    players = given.get("optimizers")
    if isinstance(players, Mapping):
        given["optimizers"] = {name: _given(section) for name, section in players.items()}
        known["optimizers"] = {_player(name): known["optimizer"] for name in players}
        partial = [*partial, *(f"optimizers.{name}" for name in players)]
    check_keys(given, known, partial=partial)
    rules.check(flatten(given), rules.of_runs())
    check_objective(objective)


def _given(section: Any) -> Any:
    """A section without the keys that are None, whose values are another section's."""
    if not isinstance(section, Mapping):
        return section
    return {key: value for key, value in section.items() if value is not None}


def _player(name: str) -> str:
    """Returns the name of a player; raises ConfigError if it cannot be one."""
    if not name.isidentifier():
        raise ConfigError(f"optimizers: {shown(name)} is not a player's name; use letters")
    return name


def check_objective(section: Mapping[str, Any]) -> None:
    """Checks names, types and ranges of an objective's settings.

    Raises:
      ConfigError: as `check`.
    """
    given = dict(section)
    name = given.pop("name")
    if name not in KINDS:
        raise ConfigError(f"objective.name: {shown(name)} is not one of {', '.join(KINDS)}")
    check_keys(given, settings_of(KINDS[name]), "objective.", partial=("objective",))
    own = (([f"objective.{key}"], rule.holds, rule.words) for key, rule in rules_of(KINDS[name]))
    rules.check(flatten({"objective": given}), own)
