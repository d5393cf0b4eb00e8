"""Configurations: all keys with their defaults, presets, allowed values, and `config.json`."""

from jax_distill.config.checking import check, check_objective
from jax_distill.config.defaults import base, optimizer_of
from jax_distill.config.presets import as_teacher, flux, overrides, shorten, student, student_model
from jax_distill.config.settings import ConfigError
from jax_distill.config.stored import check_teachers, load, save, to_json

__all__ = [
    "ConfigError",
    "as_teacher",
    "base",
    "check",
    "check_objective",
    "check_teachers",
    "flux",
    "load",
    "optimizer_of",
    "overrides",
    "save",
    "shorten",
    "student",
    "student_model",
    "to_json",
]
