"""Attention as scans over blocks of queries and of keys: memory linear in tokens, on any platform.

Each implementation (`flash_jvp_tpu` and `flash_jvp_gpu` too) has two functions, `forward` and
`backward`. Arrays are (B, N, H, D); a mask (B, M) is true where a key is kept; log-sum-exp, to base
two, and its tangent are (B, H, N).
"""

import math

import jax
import jax.numpy as jnp

from jax_distill.ops.attention import online_softmax
from jax_distill.ops.attention.online_softmax import LOG2_E, MASKED

BLOCK = 512  # tokens, of queries and of keys


def _nt(x, y):
    """(..., n, d), (..., m, d) -> (..., n, m)."""
    return jnp.einsum("...nd,...md->...nm", x, y, preferred_element_type=_accumulator(x))


def _nn(x, y):
    """(..., n, m), (..., m, d) -> (..., n, d)."""
    return jnp.einsum("...nm,...md->...nd", x, y, preferred_element_type=_accumulator(x))


def _tn(x, y):
    """(..., n, m), (..., n, d) -> (..., m, d)."""
    return jnp.einsum("...nm,...nd->...md", x, y, preferred_element_type=_accumulator(x))


def _accumulator(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _blocks(x: jax.Array) -> jax.Array:
    """(B, N, H, D) -> (blocks, B, H, block, D), zeros after the last token."""
    x = jnp.swapaxes(x, 1, 2)
    tokens = x.shape[2]
    count = math.ceil(tokens / BLOCK)
    size = math.ceil(tokens / count)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, count * size - tokens), (0, 0)))
    return jnp.moveaxis(x.reshape(*x.shape[:2], count, size, x.shape[3]), 2, 0)


def _tokens(blocks: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `_blocks`."""
    x = jnp.moveaxis(blocks, 0, 2)
    x = x.reshape(*x.shape[:2], -1, x.shape[4])[:, :, :tokens]
    return jnp.swapaxes(x, 1, 2)


def _row_blocks(x: jax.Array) -> jax.Array:
    """(B, H, N) -> (blocks, B, H, block, 1)."""
    return _blocks(jnp.swapaxes(x, 1, 2)[..., None])


def _rows(blocks: jax.Array, tokens: int) -> jax.Array:
    return jnp.swapaxes(_tokens(blocks, tokens)[..., 0], 1, 2)


def _bias_blocks(key: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """(blocks, B, 1, 1, block), added to scores: `MASKED` for masked keys and padding."""
    batch, tokens = key.shape[:2]
    count = math.ceil(tokens / BLOCK)
    if mask is None and tokens % count == 0:
        return None
    kept = jnp.ones((batch, tokens), bool) if mask is None else mask
    kept = _blocks(kept[:, :, None, None])
    bias = jnp.where(kept, 0, MASKED).astype(_accumulator(key))
    return jnp.swapaxes(bias, -1, -2)


def _scores(query, key, bias):
    scores = _nt(query, key) * (LOG2_E * query.shape[-1] ** -0.5)
    return scores if bias is None else scores + bias


def forward(query, key, value, mask=None, *tangents):
    """Output and log-sum-exp; given the tangents of query, key and value, theirs as well."""
    if tangents:
        return _forward_tangent(query, key, value, mask, *tangents)
    keys = (_blocks(key), _blocks(value), _bias_blocks(key, mask))

    def of_queries(query_block):
        def step(sums, block):
            key, value, bias = block
            scores = _scores(query_block, key, bias)
            return online_softmax.add_keys(sums, scores, value, _nn), None

        rows, width = query_block.shape[:-1], value.shape[-1]
        empty = online_softmax.empty_sums(rows, width, _accumulator(query))
        sums, _ = jax.lax.scan(step, empty, keys)
        output, lse = online_softmax.finish(sums)
        return output.astype(value.dtype), lse

    output, lse = jax.lax.map(of_queries, _blocks(query))
    return _tokens(output, query.shape[1]), _rows(lse, query.shape[1])


def _forward_tangent(query, key, value, mask, d_query, d_key, d_value):
    scale = query.shape[-1] ** -0.5
    keys = (*map(_blocks, (key, value, d_key, d_value)), _bias_blocks(key, mask))

    def of_queries(queries):
        query_block, d_query_block = queries

        def step(sums, block):
            key, value, d_key, d_value, bias = block
            scores = _scores(query_block, key, bias)
            d_scores = (_nt(d_query_block, key) + _nt(query_block, d_key)) * scale
            return online_softmax.add_keys_with_tangent(
                *sums, scores, d_scores, value, d_value, _nn
            ), None

        rows, width, dtype = query_block.shape[:-1], value.shape[-1], _accumulator(query)
        empty = (
            online_softmax.empty_sums(rows, width, dtype),
            online_softmax.empty_tangent_sums(rows, width, dtype),
        )
        (sums, tangent_sums), _ = jax.lax.scan(step, empty, keys)
        output, lse = online_softmax.finish(sums)
        d_output, d_lse = online_softmax.finish_tangent(sums, tangent_sums)
        return output.astype(value.dtype), lse, d_output.astype(value.dtype), d_lse

    blocks = jax.lax.map(of_queries, (_blocks(query), _blocks(d_query)))
    output, lse, d_output, d_lse = blocks
    count = query.shape[1]
    return _tokens(output, count), _rows(lse, count), _tokens(d_output, count), _rows(d_lse, count)


def backward(query, key, value, mask, lse, delta, cotangent):
    """Cotangents of query, key and value from that of the output.

    Weights are recomputed from the log-sum-exp. `delta` (B, H, N) is rowsum(output * cotangent)
    minus the contribution of log-sum-exp's cotangent.
    """
    scale = query.shape[-1] ** -0.5
    keys = (_blocks(key), _blocks(value), _bias_blocks(key, mask))
    queries = (_blocks(query), _blocks(cotangent), _row_blocks(lse), _row_blocks(delta))

    def of_keys(d_query, keys):
        key, value, bias = keys

        def step(sums, block):
            d_key, d_value = sums
            query, cotangent, lse, delta, d_query = block
            weights = jnp.exp2(_scores(query, key, bias) - lse)
            d_value = d_value + _tn(weights.astype(value.dtype), cotangent)
            d_scores = weights * (_nt(cotangent, value) - delta)  # never rounded to bfloat16
            d_key = d_key + _tn(d_scores, query)
            return (d_key, d_value), d_query + _nn(d_scores, key)

        empty = (jnp.zeros(key.shape, d_query.dtype), jnp.zeros(value.shape, d_query.dtype))
        (d_key, d_value), d_query = jax.lax.scan(step, empty, (*queries, d_query))
        return d_query, ((d_key * scale).astype(key.dtype), d_value.astype(value.dtype))

    empty = jnp.zeros(queries[0].shape, _accumulator(query))
    d_query, (d_key, d_value) = jax.lax.scan(of_keys, empty, keys)
    d_query = (d_query * scale).astype(query.dtype)
    return (
        _tokens(d_query, query.shape[1]),
        _tokens(d_key, key.shape[1]),
        _tokens(d_value, value.shape[1]),
    )
