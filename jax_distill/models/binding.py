"""Flax NNX modules as functions of a plain parameter tree."""

from collections.abc import Callable

import jax
from flax import nnx


def binder(create: Callable[[], nnx.Module]) -> Callable[[dict], nnx.Module]:
    """Returns a function from a nested dict of arrays to the module that has them.

    Args:
      create: makes the module; it is only traced, no parameter is allocated.
    """
    return bound(nnx.eval_shape(create))


def bound(shapes: nnx.Module) -> Callable[[dict], nnx.Module]:
    """As `binder`, for a module of shapes, as `nnx.eval_shape` makes it."""
    graph, abstract = nnx.split(shapes)

    def bind(params: dict) -> nnx.Module:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    return bind


def parameters(module: nnx.Module) -> dict:
    """A module's parameters as a nested dict of arrays; every key is a string."""

    def stringify(tree):
        if isinstance(tree, dict):
            return {str(key): stringify(value) for key, value in tree.items()}
        return tree

    return stringify(nnx.to_pure_dict(nnx.state(module)))
