"""Softmax attention with forward- and reverse-mode derivatives, fused where the platform allows.

The maths is in docs/attention.md; the primitives behind it, and their rules, are in `rules.py`.
"""

import jax
import jax.numpy as jnp

from jax_distill.ops.attention import lowering, rules

IMPLEMENTATIONS = ("auto", "xla", *lowering.IMPLEMENTATIONS)
# Up to this many scores per head, holding the score matrix is cheaper than avoiding it.
PLAIN_SCORES = 512 * 512


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Full softmax attention, `softmax(q k' / sqrt(D)) v`.

    Scores, softmax and sums are held in float32 (float64 for float64 inputs) whatever the input
    type. Every derivative, and every composition of jvp, vjp, vmap, jit, remat, scan and shard_map,
    is that of the plain formula; first derivatives are fused, second ones are plain JAX code.

    Args:
      query: (B, N, H, D).
      key: (B, M, H, D).
      value: (B, M, H, E).
      mask: (B, M), true where a key is kept; each sample keeps at least one.
      implementation: "xla", plain code that holds all scores, the reference; "blocked", scans over
        blocks, memory linear in N and M; "pallas_tpu" and "pallas_gpu", fused kernels, interpreted
        (slowly) on other platforms than their own; or "auto": plain code for few tokens, otherwise
        the kernels of the platform that the computation is lowered for, where they take the shapes,
        or else "blocked".

    Returns:
      (B, N, H, E) in `value`'s type.

    Raises:
      ValueError: shapes that do not fit together, an unknown implementation, or one that does not
        take these shapes.

    Source: Dao, arXiv:2307.08691 (the forward and backward passes); the tangent follows from it.
    """
    _check(query, key, value, mask, implementation)
    scores = query.shape[1] * key.shape[1]
    if implementation == "xla" or (implementation == "auto" and scores <= PLAIN_SCORES):
        return plain(query, key, value, mask)
    return rules.attention(query, key, value, mask, implementation)


def plain(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """`attention` with the whole score matrix; its derivatives are JAX's own."""
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=accumulate) * scale
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, value)


def _check(query, key, value, mask, implementation):
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"attention implementation: {implementation!r} is not one of {known}")
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    batch, _, heads, width = query.shape if query.ndim == 4 else (None,) * 4
    keys = key.shape[1] if key.ndim == 4 else None
    if key.shape != (batch, keys, heads, width) or value.shape[:-1] != (batch, keys, heads):
        raise ValueError(f"attention: {shapes} must be (B, N, H, D), (B, M, H, D), (B, M, H, E)")
    if mask is not None and (mask.shape != (batch, keys) or mask.dtype != bool):
        raise ValueError(
            f"attention: mask {mask.shape} of {mask.dtype} must be ({batch}, {keys}) of bool"
        )
