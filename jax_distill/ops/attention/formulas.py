"""Derivatives of attention that no kernel computes, as plain formulas, which hold the scores.

Arrays are (B, N, H, D); log-sum-exp and its tangents are to base two, (B, H, N).
"""

import jax
import jax.numpy as jnp

from jax_distill.ops.attention.online_softmax import LOG2_E


def row_delta(output, cotangent, lse_cotangent):
    """The term subtracted from the cotangents of a row's weights, (B, H, N)."""
    product = output.astype(lse_cotangent.dtype) * cotangent.astype(lse_cotangent.dtype)
    return jnp.swapaxes(jnp.sum(product, -1), 1, 2) - lse_cotangent * LOG2_E


def _weights(query, key, mask, lse):
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=lse.dtype)
    weights = jnp.exp2(scores * (LOG2_E * query.shape[-1] ** -0.5) - lse[..., None])
    return weights if mask is None else jnp.where(mask[:, None, None, :], weights, 0)


def tangent(query, key, value, mask, lse, d_query, d_key, d_value):
    """Tangents of output and log-sum-exp, with log-sum-exp as an argument of its own."""

    def product(spec, x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=lse.dtype)

    weights = _weights(query, key, mask, lse)
    d_scores = product("bnhd,bmhd->bhnm", d_query, key) + product("bnhd,bmhd->bhnm", query, d_key)
    d_scores = d_scores * query.shape[-1] ** -0.5
    mean = jnp.sum(weights * d_scores, -1)
    d_weights = (weights * (d_scores - mean[..., None])).astype(value.dtype)
    d_output = product("bhnm,bmhe->bnhe", weights.astype(value.dtype), d_value)
    d_output = d_output + product("bhnm,bmhe->bnhe", d_weights, value)
    return d_output.astype(value.dtype), mean * LOG2_E


def curvature(query, key, value, mask, lse, *rest):
    """Derivative of `tangent` with respect to query, key, value and log-sum-exp.

    `rest`: the tangents that `tangent` takes, then the directions of the four.
    """
    linear, moves = rest[:3], rest[3:]

    def function(query, key, value, lse):
        return tangent(query, key, value, mask, lse, *linear)

    return jax.jvp(function, (query, key, value, lse), moves)[1]


def backward(query, key, value, mask, output, lse, cotangent, lse_cotangent):
    """Cotangents of query, key and value: the transpose of `tangent`."""

    def product(spec, x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=lse.dtype).astype(query.dtype)

    scale = query.shape[-1] ** -0.5
    weights = _weights(query, key, mask, lse)
    d_weights = jnp.einsum("bnhe,bmhe->bhnm", cotangent, value, preferred_element_type=lse.dtype)
    delta = row_delta(output, cotangent, lse_cotangent)
    d_scores = (weights * (d_weights - delta[..., None])).astype(query.dtype)
    return (
        product("bhnm,bmhd->bnhd", d_scores, key) * scale,
        product("bhnm,bnhd->bmhd", d_scores, query) * scale,
        product("bhnm,bnhe->bmhe", weights.astype(value.dtype), cotangent),
    )
