"""Layers of the text encoders: dense layers and norms of mixed precision, stacks of blocks.

Matrices are multiplied in the type of the computation. Everything else (sums, norms, residual
streams) is wide: float32, or float64 if that is the type of the computation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_distill.ops.placement import constrain


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes the text encoders' layers: one place for types and initialisation."""

    rngs: nnx.Rngs
    dtype: Any
    param_dtype: Any

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.dtype, jnp.float32)

    def linear(self, inputs: int, outputs: int, *, bias: bool, dtype: Any = None) -> nnx.Linear:
        """A dense layer of a wide result, which multiplies in `dtype` if that is given."""
        return nnx.Linear(
            inputs,
            outputs,
            use_bias=bias,
            kernel_init=nnx.initializers.xavier_uniform(),
            dtype=self.dtype if dtype is None else dtype,
            param_dtype=self.param_dtype,
            preferred_element_type=self.wide,
            rngs=self.rngs,
        )

    def layer_norm(self, features: int, epsilon: float) -> nnx.LayerNorm:
        return nnx.LayerNorm(
            features,
            epsilon=epsilon,
            use_fast_variance=False,
            dtype=self.wide,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def rms_norm(self, features: int, epsilon: float) -> nnx.RMSNorm:
        return nnx.RMSNorm(
            features,
            epsilon=epsilon,
            dtype=self.wide,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def table(self, rows: int, features: int) -> nnx.Param:
        """A learned vector (features,) for each of `rows`."""
        normal = nnx.initializers.normal(1.0)
        return nnx.Param(normal(self.rngs.params(), (rows, features), self.param_dtype))

    def stack(self, block: Callable[["Layers"], nnx.Module], count: int) -> nnx.Module:
        """`count` blocks as one, their parameters stacked along a leading layer axis."""

        @nnx.split_rngs(splits=count)
        @nnx.vmap
        def create(layer_rngs):
            return block(dataclasses.replace(self, rngs=layer_rngs))

        return create(self.rngs)


def placed(x: jax.Array) -> jax.Array:
    """The residual stream (B, L, D), each device with its rows of the batch."""
    return constrain(x, "batch", "tokens", None)


def split_heads(x: jax.Array, heads: int, dtype: Any) -> jax.Array:
    """(B, L, heads D) to (B, L, heads, D) of the computation's type, for `attend`."""
    split = x.reshape(*x.shape[:-1], heads, -1).astype(dtype)
    return constrain(split, "batch", None, "heads", None)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float = 1.0,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Attention with a bias or a mask on its scores; scores and softmax are wide.

    Args:
      query: (B, L, H, D).
      key: (B, M, H, D).
      value: (B, M, H, D).
      scale: of the products, before the bias.
      bias: broadcasts to (B, H, L, M).
      mask: broadcasts to (B, H, L, M); false where a key is not to be seen.

    Returns:
      (B, L, H D), heads merged, wide.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("blhd,bmhd->bhlm", query, key, preferred_element_type=wide) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bhlm,bmhd->blhd", weights, value, preferred_element_type=wide)
    out = constrain(out, "batch", None, "heads", None)
    return out.reshape(*out.shape[:2], -1)


def scan(blocks: nnx.Module, x: jax.Array, *args: Any) -> jax.Array:
    """Applies stacked blocks `x = block(x, *args)` one after another; compiles one of them."""
    graph, stacked = nnx.split(blocks)

    def layer(carry, state):
        return nnx.merge(graph, state)(carry, *args), None

    return jax.lax.scan(layer, x, stacked)[0]
