"""Fused attention on NVIDIA GPUs: forward, forward with tangent, and backward, in Pallas (Triton).

A program holds a block of queries and loops over the keys of its head; for the gradients of keys
and values it holds a block of keys and loops over queries. So the backward computes the weights
twice (seven matrix products instead of five) but needs neither atomics nor partial sums: two runs
give the same bits. Arrays are read where they lie, (B, N, H, D). The functions are those of
`blocked`.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_distill.ops.attention.block_sizes import Blocks
from jax_distill.ops.attention.forward_kernels import forward_kernel, forward_tangent_kernel
from jax_distill.ops.attention.online_softmax import LOG2_E, MASKED, nn, nt, result_of

WIDTHS = (32, 64, 128)


def unsupported(query, key, value) -> str | None:
    """The reason why the kernels do not take these shapes; None if they do."""
    del key
    width = query.shape[-1]
    if value.shape[-1] != width:
        return f"needs values as wide as keys, got {value.shape[-1]} and {width}"
    if width not in WIDTHS:
        return f"takes heads of {', '.join(map(str, WIDTHS))} channels, not {width}"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {query.dtype}"
    return None


def _over_blocks(tokens: int, body, carry, *, block: int):
    """carry = body(slice of tokens, carry), block after block."""
    return lax.fori_loop(
        0, tokens // block, lambda i, carry: body(pl.ds(i * block, block), carry), carry
    )


def _backward_keys_kernel(*refs, masked: bool, block: int, scale: float):
    """Scores lie here as (keys, queries), so that weights need no transpose."""
    query, key, value, *bias, lse, delta, cotangent, d_key, d_value = refs
    k, v = key[...], value[...]

    def body(queries, sums):
        dk, dv = sums
        q, ct = query[queries, :], cotangent[queries, :]
        scores = nt(k, q) * (LOG2_E * scale)
        if masked:
            scores = scores + bias[0][...]
        weights = jnp.exp2(scores - lse[:, queries])
        dv = dv + nn(weights.astype(ct.dtype), ct)
        d_scores = weights * (nt(v, ct) - delta[:, queries])
        return dk + nn(d_scores.astype(q.dtype), q), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _over_blocks(query.shape[0], body, (zeros, zeros), block=block)
    d_key[...] = (dk * scale).astype(d_key.dtype)
    d_value[...] = dv.astype(d_value.dtype)


def _backward_queries_kernel(*refs, masked: bool, block: int, scale: float):
    query, key, value, *bias, lse, delta, cotangent, d_query = refs
    q, ct, lse, delta = query[...], cotangent[...], lse[...], delta[...]

    def body(keys, dq):
        k = key[keys, :]
        scores = nt(q, k) * (LOG2_E * scale)
        if masked:
            scores = scores + bias[0][:, keys]
        d_scores = jnp.exp2(scores - lse) * (nt(ct, value[keys, :]) - delta)
        return dq + nn(d_scores.astype(k.dtype), k)

    dq = _over_blocks(key.shape[0], body, jnp.zeros(q.shape, jnp.float32), block=block)
    d_query[...] = (dq * scale).astype(d_query.dtype)


def _padded(tokens: int, blocks: Blocks) -> int:
    return tokens + -tokens % max(blocks.kept, blocks.looped)


def _pad(x, tokens: int):
    """Pads (B, N, ...) with zeros to `tokens`."""
    return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def _pad_rows(x, tokens: int):
    """Pads (B, H, N) likewise."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, tokens - x.shape[2])))


def _bias(key, mask, tokens: int):
    """The bias (B, tokens) of the scores; None if no key is masked or padding."""
    if mask is None and tokens == key.shape[1]:
        return None
    mask = jnp.ones(key.shape[:2], bool) if mask is None else mask
    return jnp.where(_pad(mask, tokens), 0.0, MASKED)


def _tokens(count: int, width: int, *, walks: bool):
    """The grid's block of `count` tokens, at (block, head, batch); all tokens unless it walks."""
    return pl.BlockSpec((None, count, None, width), lambda i, h, b: (b, i if walks else 0, h, 0))


def _column(count: int):
    """The statistics (B, H, N, 1) of the grid's block of rows."""
    return pl.BlockSpec((None, None, count, 1), lambda i, h, b: (b, h, i, 0))


def _row(count: int):
    """The statistics (B, H, 1, N) of all rows."""
    return pl.BlockSpec((None, None, 1, count), lambda i, h, b: (b, h, 0, 0))


def _call(kernel, name, grid, operands, specs, results, blocks: Blocks, interpret: bool):
    shapes, result_specs = zip(*results)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs,
        out_specs=result_specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=name,
    )(*operands)


def forward(query, key, value, mask, *tangents, blocks: Blocks, interpret: bool):
    """Output and log-sum-exp; given the tangents of query, key and value, theirs as well."""
    batch, rows, heads, width = query.shape
    queries, keys = _padded(rows, blocks), _padded(key.shape[1], blocks)
    bias = _bias(key, mask, keys)
    of_query = _tokens(blocks.kept, width, walks=True)
    of_keys = _tokens(keys, width, walks=False)
    sizes, specs = (queries, keys, keys), [of_query, of_keys, of_keys]
    operands = [_pad(x, size) for x, size in zip((query, key, value), sizes)]
    operands_of_tangents = [_pad(x, size) for x, size in zip(tangents, sizes)]
    specs_of_tangents = specs[: len(tangents)]
    if bias is not None:
        operands.append(bias[:, None, :])
        specs = [*specs, pl.BlockSpec((None, 1, keys), lambda i, h, b: (b, 0, 0))]
    results = [
        (result_of(query, operands[0].shape, value.dtype), of_query),
        (
            result_of(query, (batch, heads, queries, 1), jnp.float32),
            _column(blocks.kept),
        ),
    ]
    kernel = functools.partial(
        forward_tangent_kernel if tangents else forward_kernel,
        masked=bias is not None,
        scale=width**-0.5,
        loop=functools.partial(_over_blocks, block=blocks.looped),
        stored=lambda column: column,
    )
    out = _call(
        kernel,
        "attention_with_tangent" if tangents else "attention",
        (queries // blocks.kept, heads, batch),
        operands + operands_of_tangents,
        specs + specs_of_tangents,
        results * (2 if tangents else 1),
        blocks,
        interpret,
    )
    return tuple(x[:, :rows] if i % 2 == 0 else x[:, :, :rows, 0] for i, x in enumerate(out))


def backward(query, key, value, mask, lse, delta, cotangent, *, blocks: Blocks, interpret: bool):
    """Cotangents of query, key and value; see `blocked.backward`."""
    batch, _, heads, width = query.shape
    queries, keys = _padded(query.shape[1], blocks), _padded(key.shape[1], blocks)
    bias = _bias(key, mask, keys)
    q, ct, k, v = _pad(query, queries), _pad(cotangent, queries), _pad(key, keys), _pad(value, keys)
    lse, delta = _pad_rows(lse, queries), _pad_rows(delta, queries)
    options = {"masked": bias is not None, "block": blocks.looped, "scale": width**-0.5}

    of_key = _tokens(blocks.kept, width, walks=True)
    of_queries = _tokens(queries, width, walks=False)
    biases, bias_specs = [], []
    if bias is not None:
        biases = [bias[:, :, None]]
        bias_specs = [pl.BlockSpec((None, blocks.kept, 1), lambda i, h, b: (b, i, 0))]
    d_key, d_value = _call(
        functools.partial(_backward_keys_kernel, **options),
        "attention_backward_keys",
        (keys // blocks.kept, heads, batch),
        [q, k, v, *biases, lse[:, :, None], delta[:, :, None], ct],
        [of_queries, of_key, of_key, *bias_specs, _row(queries), _row(queries), of_queries],
        [(result_of(query, x.shape, x.dtype), of_key) for x in (k, v)],
        blocks,
        interpret,
    )

    of_query = _tokens(blocks.kept, width, walks=True)
    of_keys = _tokens(keys, width, walks=False)
    of_rows = _column(blocks.kept)
    if bias is not None:
        biases = [bias[:, None, :]]
        bias_specs = [pl.BlockSpec((None, 1, keys), lambda i, h, b: (b, 0, 0))]
    (d_query,) = _call(
        functools.partial(_backward_queries_kernel, **options),
        "attention_backward_queries",
        (queries // blocks.kept, heads, batch),
        [q, k, v, *biases, lse[..., None], delta[..., None], ct],
        [of_query, of_keys, of_keys, *bias_specs, of_rows, of_rows, of_query],
        [(result_of(query, q.shape, q.dtype), of_query)],
        blocks,
        interpret,
    )
    return d_query[:, : query.shape[1]], d_key[:, : key.shape[1]], d_value[:, : key.shape[1]]
