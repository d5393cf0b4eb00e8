"""All objectives by their names: whatever stands in a file of this folder."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator

from jax_distill import objectives
from jax_distill.objectives.objective import Method


def _found() -> Iterator[type[Method]]:
    for info in pkgutil.iter_modules(objectives.__path__, f"{objectives.__name__}."):
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, type) and issubclass(value, Method) and "name" in vars(value):
                yield value


KINDS = {kind.name: kind for kind in _found()}
"""By `objective.name`."""

OBJECTIVES = {
    name: kind
    for name, kind in KINDS.items()
    if "network" in {field.name for field in dataclasses.fields(kind)}
}
"""Those that train velocity networks."""

FROM_SCRATCH = tuple(name for name, kind in KINDS.items() if kind.from_scratch)
"""Objectives without a teacher."""
