"""Forward kernels of fused attention, the same on TPUs and on GPUs.

A program holds a block of queries and loops over the keys of its head. The loop, and the
layout of a query statistic in memory, depend on the hardware and are passed in:
`loop(tokens, body, carry)` applies carry = body(slice of tokens, carry), part after part, and
`stored` turns a column (n, 1) into the layout of a statistic.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_distill.ops.attention import online_softmax
from jax_distill.ops.attention.online_softmax import LOG2_E, nn, nt


def forward_kernel(
    *refs, masked: bool, scale: float, loop: Callable, stored: Callable[[jax.Array], jax.Array]
):
    """Output and log-sum-exp from query, key, value and, if `masked`, a bias of the keys."""
    query, key, value, *bias, output, lse = refs
    q = query[...]

    def body(keys, sums):
        scores = nt(q, key[keys, :]) * (LOG2_E * scale)
        if masked:
            scores = scores + bias[0][:, keys]
        return online_softmax.add_keys(sums, scores, value[keys, :], nn)

    empty = online_softmax.empty_sums(q.shape[:1], q.shape[1], jnp.float32)
    out, log_sum_exp = online_softmax.finish(loop(key.shape[0], body, empty))
    output[...] = out.astype(output.dtype)
    lse[...] = stored(log_sum_exp)


def forward_tangent_kernel(
    *refs, masked: bool, scale: float, loop: Callable, stored: Callable[[jax.Array], jax.Array]
):
    """The same, and the tangents of both; the inputs' tangents come after the bias."""
    query, key, value, *bias, d_query, d_key, d_value = refs[:-4]
    output, lse, d_output, d_lse = refs[-4:]
    q, dq = query[...], d_query[...]

    def body(keys, sums):
        k = key[keys, :]
        scores = nt(q, k) * (LOG2_E * scale)
        d_scores = (nt(dq, k) + nt(q, d_key[keys, :])) * scale
        if masked:
            scores = scores + bias[0][:, keys]
        return online_softmax.add_keys_with_tangent(
            *sums, scores, d_scores, value[keys, :], d_value[keys, :], nn
        )

    rows, width = q.shape[:1], q.shape[1]
    empty = (
        online_softmax.empty_sums(rows, width, jnp.float32),
        online_softmax.empty_tangent_sums(rows, width, jnp.float32),
    )
    sums, tangent_sums = loop(key.shape[0], body, empty)
    out, log_sum_exp = online_softmax.finish(sums)
    d_out, d_log_sum_exp = online_softmax.finish_tangent(sums, tangent_sums)
    output[...] = out.astype(output.dtype)
    lse[...] = stored(log_sum_exp)
    d_output[...] = d_out.astype(d_output.dtype)
    d_lse[...] = stored(d_log_sum_exp)
