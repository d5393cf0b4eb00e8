"""Configurations: the keys that there are, presets, what values may be, how a run keeps its own."""

from jax_distill.config.defaults import (
    base,
    check,
    check_objective,
    check_teachers,
    flux,
    load,
    save,
    shorten,
    student,
    student_model,
    to_json,
)
from jax_distill.config.settings import ConfigError

__all__ = [
    "ConfigError",
    "base",
    "check",
    "check_objective",
    "check_teachers",
    "flux",
    "load",
    "save",
    "shorten",
    "student",
    "student_model",
    "to_json",
]
