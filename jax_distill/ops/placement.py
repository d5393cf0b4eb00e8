"""Placement of activations on a mesh: networks name axes, the tracing code maps the names."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]
"""The mesh's axes over which an activation's axis of some name is split."""

_placed: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
    "placed", default=None
)


@contextlib.contextmanager
def placed_on(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Within, while a function is traced, `constrain` places activations on the mesh."""
    token = _placed.set((mesh, rules))
    try:
        yield
    finally:
        _placed.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, placed by the rules, one name or None an axis; axes that do not divide are whole.

    Outside of `placed_on`, and on one device, it is x as it is.
    """
    placed = _placed.get()
    if placed is None or placed[0].size == 1:
        return x
    mesh, rules = placed
    spec = []
    for size, name in zip(x.shape, names, strict=True):
        axes = rules[name] if name else ()
        count = math.prod(mesh.shape[axis] for axis in axes)
        spec.append(axes if axes and size % count == 0 else None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
