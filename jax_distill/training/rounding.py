"""Stochastic rounding to bfloat16, for running averages and optimizer moments.

A running average moves by a thousandth of itself or less a step, and bfloat16 has 8 bits: rounded
to nearest it would never move. Rounded up or down at random, with probabilities that keep the
expected value, it follows; the noise is that of single roundings and averages out over the steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_distill import streams

DTYPES = ("float32", "bfloat16")


def stochastic_round(key: jax.Array, x: jax.Array) -> jax.Array:
    """float32 in bfloat16, up or down at random, with the expected value x.

    What bfloat16 has is left as it is; so is what is not finite.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jnp.where(jnp.isfinite(x), bits + noise, bits) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(cut, jnp.float32).astype(jnp.bfloat16)


def narrow(tree: Any, dtype: str) -> Any:
    """The float32 arrays of a tree in a type of `DTYPES`, to nearest; embedders stay as they are.

    These carry time and guidance, and are few.
    """

    def narrow_leaf(path: tuple, leaf: jax.Array) -> jax.Array:
        embeds = any(str(getattr(key, "key", "")).endswith("_embedder") for key in path)
        return leaf.astype(dtype) if leaf.dtype == "float32" and not embeds else leaf

    return jax.tree_util.tree_map_with_path(narrow_leaf, tree)


def widen(tree: Any) -> Any:
    """The inverse of `narrow`."""
    wide = jnp.float32
    return jax.tree.map(lambda leaf: leaf.astype(wide) if leaf.dtype == "bfloat16" else leaf, tree)


def narrow_as(key: jax.Array, tree: Any, like: Any) -> Any:
    """The arrays of a tree, rounded at random where those of another are bfloat16."""
    leaves, structure = jax.tree.flatten(tree)
    rounded = [
        stochastic_round(jax.random.fold_in(key, index), leaf) if leaf.dtype != old.dtype else leaf
        for index, (leaf, old) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, rounded)


class NarrowState(NamedTuple):
    """Of `in_bfloat16`."""

    count: jax.Array  # updates made
    inner: Any  # the optimizer's, what it has of each parameter in bfloat16


def in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, what it remembers of each parameter in bfloat16; it computes in float32."""
    stream = 0  # the same in every run: what is rounded differs

    def init(params):
        names = [name for name, _ in _named(params)]
        state = optimizer.init(params)
        leaves = [
            narrow(leaf, "bfloat16") if name.endswith(tuple(names)) else leaf
            for name, leaf in _named(state)
        ]
        inner = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return NarrowState(jnp.zeros((), jnp.int32), inner)

    def update(gradient, state, params=None):
        updates, inner = optimizer.update(gradient, widen(state.inner), params)
        key = jax.random.fold_in(streams.key(stream), state.count)
        return updates, NarrowState(state.count + 1, narrow_as(key, inner, state.inner))

    return optax.GradientTransformation(init, update)


def _named(tree: Any) -> list[tuple[str, jax.Array]]:
    """Leaves by their path; a moment's ends as its parameter's."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
