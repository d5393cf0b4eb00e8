"""Softmax attention that can be differentiated in both modes."""

import jax
import jax.numpy as jnp


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Full softmax attention, `softmax(q k' / sqrt(D)) v`.

    Scores and softmax are held in float32 (float64 for float64 inputs) whatever the input type.
    Every derivative (jvp, vjp, and vjp beside a stopped tangent) is that of plain JAX code.

    Args:
      query: (B, N, H, D).
      key: (B, M, H, D).
      value: (B, M, H, D).

    Returns:
      (B, N, H, D) in `value`'s type.
    """
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=accumulate) * scale
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, value)
