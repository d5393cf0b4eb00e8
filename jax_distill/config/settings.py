"""Settings: nested values whose names and types are those of their defaults."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jax_distill.storage.quoting import shown


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and the fix."""


class Misspelt(AttributeError):
    """A key that a section does not have; the message names one that is close."""


class WrongType(TypeError):
    """A value that a key cannot have; the message names the types."""


class Settings(ConfigDict):
    """A ConfigDict, with its sections, whose errors are short sentences."""

    def __init__(self, values: Mapping[str, Any] | None = None, type_safe: bool = True):
        nested = {k: Settings(v) if isinstance(v, dict) else v for k, v in (values or {}).items()}
        super().__init__(nested, type_safe=type_safe)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise Misspelt(no_such_key(name, self)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except AttributeError:
            raise Misspelt(no_such_key(name, self)) from None
        except TypeError:
            kinds = self.get_type(name).__name__, type(value).__name__
            raise WrongType("{} must be of type {}, not {}".format(name, *kinds)) from None


def no_such_key(name: str, section: Any) -> str:
    """Says that a section has no such key, and which one is close."""
    close = difflib.get_close_matches(name, section if isinstance(section, ConfigDict) else (), n=1)
    return f"there is no key '{name}'" + (f"; did you mean '{close[0]}'?" if close else "")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_keys(
    given: Mapping[str, Any],
    known: Mapping[str, Any],
    prefix: str = "",
    partial: Sequence[str] = (),
) -> None:
    """Checks that settings have the keys of their defaults, with values of their types.

    Args:
      given: the settings, nested.
      known: the defaults, nested in the same way; None takes a number or none, a tuple one value or
        more of its first one's type.
      prefix: of the keys in error messages, such as "objective.".
      partial: names of the keys below which some may be missing; "" for all.

    Raises:
      ConfigError: naming the first key that is unknown, missing or of another type.
    """
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
            name = prefix + shown(key).strip("'")
            raise ConfigError(f"{name}: there is no such key; {hint}")
    for key, default in known.items():
        name = prefix + key
        if key not in given:
            if prefix.rstrip(".") in partial:
                continue
            raise ConfigError(
                f"{name}: missing; set keys of config.{prefix.rstrip('.')} one by one instead of"
                " replacing it"
            )
        value = given[key]
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            check_keys(value, default, f"{name}.", partial)
        elif not _fits(value, default):
            kind = type(default).__name__
            if isinstance(default, Mapping):
                kind = f"a section, with keys such as {next(iter(default), 'name')!r}"
            elif default is None:
                kind = "a number or null"
            elif isinstance(default, tuple):
                kind = f"a list of one {type(default[0]).__name__} or more"
            raise ConfigError(f"{name}: {shown(value)} must be {kind}")


def _fits(value: Any, default: Any) -> bool:
    if default is None:
        return value is None or _fits(value, 0.0)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, float | int)
    if isinstance(default, tuple):
        return (
            isinstance(value, tuple | list) and value and all(_fits(v, default[0]) for v in value)
        )
    return isinstance(value, type(default))
