"""Softmax attention and its derivatives, a block of keys at a time: the maths of all kernels.

Scores are kept to base two, `s = log2(e) / sqrt(D) q k'`, since hardware exponentials are. With
m the running maximum of a query's scores, p = 2^(s - m), l = sum p and O = sum p v, a new block of
keys rescales what was summed by 2^(m_old - m_new) (Milakov & Gimelshein, arXiv:1805.02867; Dao,
arXiv:2307.08691), and o = O / l.

The tangent adds, with ds = (dq k' + q dk') / sqrt(D), the running mean c = sum p ds / l of the
score tangents and T = sum p dv + sum p (ds - c) v. A block that moves the mean by e moves T by
-e O, so T / l is do = p dv + p (ds - rowsum(p ds)) v at any time, centred as it is summed: nothing
large cancels when p (ds - c) is rounded to bfloat16, and c ends as the tangent of log-sum-exp, up
to the change of base.

Every function works on the last two axes, on blocks within a kernel and on batches alike. A row
statistic keeps its axis: (..., n, 1).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)
# Added to the scores of masked keys: finite, so that a row whose blocks so far are all masked has
# a maximum to subtract; the first kept key then scales what such blocks summed by zero.
MASKED = -1e30

Dot = Callable[[jax.Array, jax.Array], jax.Array]


def _product(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Product of two blocks within a kernel, in float32 throughout for float32 inputs."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


nt = functools.partial(_product, over=(1, 1))  # (n, d), (m, d) -> (n, m)
nn = functools.partial(_product, over=(1, 0))  # (n, m), (m, d) -> (n, d)
tn = functools.partial(_product, over=(0, 0))  # (n, m), (n, d) -> (m, d)


def result_of(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """Shape and type of a kernel's result, which varies over the mesh as x does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


class Sums(NamedTuple):
    """A query's sums over the keys so far."""

    maximum: jax.Array  # (..., n, 1): m
    normalizer: jax.Array  # (..., n, 1): l
    output: jax.Array  # (..., n, d): O


class TangentSums(NamedTuple):
    mean: jax.Array  # (..., n, 1): c
    tangent: jax.Array  # (..., n, d): T


def empty_sums(rows: tuple[int, ...], width: int, dtype) -> Sums:
    """Sums over no keys, for queries of leading shape `rows`."""
    return Sums(
        jnp.full((*rows, 1), MASKED, dtype),
        jnp.zeros((*rows, 1), dtype),
        jnp.zeros((*rows, width), dtype),
    )


def empty_tangent_sums(rows: tuple[int, ...], width: int, dtype) -> TangentSums:
    return TangentSums(jnp.zeros((*rows, 1), dtype), jnp.zeros((*rows, width), dtype))


def add_keys(sums: Sums, scores: jax.Array, value: jax.Array, dot: Dot) -> Sums:
    """Adds a block of keys to the sums.

    Args:
      sums: over the keys before.
      scores: (..., n, m), to base two.
      value: (..., m, d).
      dot: (..., n, m), (..., m, d) -> (..., n, d), accumulated in the sums' type.
    """
    weights, kept, maximum, normalizer = _rescale(sums, scores)
    output = kept * sums.output + dot(weights.astype(value.dtype), value)
    return Sums(maximum, normalizer, output)


def add_keys_with_tangent(
    sums: Sums,
    tangent_sums: TangentSums,
    scores: jax.Array,
    d_scores: jax.Array,
    value: jax.Array,
    d_value: jax.Array,
    dot: Dot,
) -> tuple[Sums, TangentSums]:
    """`add_keys`, of output and tangent together; d_scores, (..., n, m), are to base e."""
    weights, kept, maximum, normalizer = _rescale(sums, scores)
    mean, tangent = tangent_sums
    moved = jnp.sum(weights * (d_scores - mean), -1, keepdims=True) / normalizer
    mean = mean + moved
    d_weights = (weights * (d_scores - mean)).astype(value.dtype)
    weights = weights.astype(value.dtype)
    tangent = kept * (tangent - moved * sums.output) + dot(d_weights, value) + dot(weights, d_value)
    output = kept * sums.output + dot(weights, value)
    return Sums(maximum, normalizer, output), TangentSums(mean, tangent)


def _rescale(sums: Sums, scores: jax.Array):
    """Weights of a block, the factor on what came before, and the new maximum and normalizer."""
    maximum = jnp.maximum(sums.maximum, jnp.max(scores, -1, keepdims=True))
    weights, kept = jnp.exp2(scores - maximum), jnp.exp2(sums.maximum - maximum)
    normalizer = kept * sums.normalizer + jnp.sum(weights, -1, keepdims=True)
    return weights, kept, maximum, normalizer


def finish(sums: Sums) -> tuple[jax.Array, jax.Array]:
    """Output (..., n, d) and log-sum-exp (..., n, 1) of the scores.

    Log-sum-exp stays to base two as well: changing base would round it twice more, and every
    weight that the backward pass makes from it has its error.
    """
    return sums.output / sums.normalizer, sums.maximum + jnp.log2(sums.normalizer)


def finish_tangent(sums: Sums, tangent_sums: TangentSums) -> tuple[jax.Array, jax.Array]:
    """Tangents of `finish`'s results."""
    return tangent_sums.tangent / sums.normalizer, tangent_sums.mean * LOG2_E
