"""Fused attention on TPUs: forward, forward with tangent, and backward, in Pallas.

A program of the forward kernels holds a block of queries and, of its head, all keys and values in
VMEM, where they stay for the next block of queries; it loops over chunks of keys. A program of the
backward kernel holds a block of keys and all queries of its head, whose gradients add up in VMEM
until the last block of keys. So each array is read from HBM once and written once.

Heads of 128 channels or a multiple are read where they lie, as lanes of (B, N, H D); narrower ones
are moved to (B H, N, D) first. The functions are those of `blocked`.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_distill.ops.attention.block_sizes import Blocks
from jax_distill.ops.attention.forward_kernels import forward_kernel, forward_tangent_kernel
from jax_distill.ops.attention.online_softmax import LOG2_E, MASKED, nn, nt, result_of, tn

LANES = 128
VMEM_BYTES = 64 * 2**20  # limit of a kernel
RESIDENT_BYTES = 40 * 2**20  # of which one head's tokens take at most this


def unsupported(query, key, value) -> str | None:
    """The reason why the kernels do not take these shapes; None if they do."""
    width = query.shape[-1]
    if value.shape[-1] != width:
        return f"needs values as wide as keys, got {value.shape[-1]} and {width}"
    if width % 64 or width > 256:
        return f"takes heads of 64, 128, 192 or 256 channels, not {width}"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {query.dtype}"
    # A kernel has at most four resident arrays, double buffered; the backward also sums the
    # gradients of queries in float32.
    tokens = max(query.shape[1], key.shape[1])
    if tokens * max(width, LANES) * (8 * query.dtype.itemsize + 4) > RESIDENT_BYTES:
        return f"holds one head in VMEM, and {tokens} tokens are too many"
    return None


def _as_row(column):
    """(n, 1) -> (1, n), by a transpose that the hardware supports."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _over_chunks(tokens: int, body, carry, *, chunk: int):
    """carry = body(slice of tokens, carry), chunk after chunk; the last may be shorter."""
    whole = tokens // chunk

    def step(i, carry):
        return body(pl.ds(pl.multiple_of(i * chunk, LANES), chunk), carry)

    carry = lax.fori_loop(0, whole, step, carry)
    rest = tokens - whole * chunk
    return body(pl.ds(whole * chunk, rest), carry) if rest else carry


def _backward_kernel(*refs, masked: bool, chunk: int, scale: float):
    """Scores lie here as (keys, queries), so that a query's statistics are rows of lanes."""
    query, key, value, *bias, lse, delta, cotangent = refs[:-4]
    d_query, d_key, d_value, d_query_sum = refs[-4:]
    k, v = key[...], value[...]

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_query_sum[...] = jnp.zeros_like(d_query_sum)

    def body(queries, sums):
        dk, dv = sums
        q, ct = query[queries, :], cotangent[queries, :]
        scores = nt(k, q) * (LOG2_E * scale)
        if masked:
            scores = scores + bias[0][...]
        weights = jnp.exp2(scores - lse[:, queries])
        dv = dv + nn(weights.astype(ct.dtype), ct)
        d_scores = (weights * (nt(v, ct) - delta[:, queries])).astype(q.dtype)
        dk = dk + nn(d_scores, q)
        d_query_sum[queries, :] += tn(d_scores, k)
        return dk, dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _over_chunks(query.shape[0], body, (zeros, zeros), chunk=chunk)
    d_key[...] = (dk * scale).astype(d_key.dtype)
    d_value[...] = dv.astype(d_value.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        d_query[...] = (d_query_sum[...] * scale).astype(d_query.dtype)


class _Arrays:
    """Layout of the kernels' arrays, for a grid of (batch, head, block)."""

    def __init__(self, query, key):
        self.batch, self.queries, self.heads, self.width = query.shape
        self.keys = key.shape[1]
        self.in_lanes = self.width % LANES == 0

    def pack(self, x):
        """(B, N, H, D) as the kernels read it, N padded with zeros to a multiple of 128."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, 0)))
        if self.in_lanes:
            return x.reshape(*x.shape[:2], -1)
        return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], self.width)

    def unpack(self, x, tokens: int):
        if self.in_lanes:
            x = x.reshape(self.batch, -1, self.heads, self.width)
        else:
            x = jnp.swapaxes(x.reshape(self.batch, self.heads, -1, self.width), 1, 2)
        return x[:, :tokens]

    def pack_rows(self, x):
        """(B, H, N) -> (B H, 1, N), padded likewise."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES)))
        return x.reshape(-1, 1, x.shape[2])

    def unpack_rows(self, x, tokens: int):
        return x.reshape(self.batch, self.heads, -1)[:, :, :tokens]

    def bias(self, mask):
        """The bias (B, keys) of the scores; None if no key is masked or padding."""
        filler = -self.keys % LANES
        if mask is None and not filler:
            return None
        mask = jnp.ones((self.batch, self.keys), bool) if mask is None else mask
        return jnp.where(jnp.pad(mask, ((0, 0), (0, filler))), 0.0, MASKED)

    def tokens(self, count: int, *, walks: bool):
        """The grid's block of `count` tokens; all tokens unless it walks."""

        def place(b, h, i):
            i = i if walks else 0
            return (b, i, h) if self.in_lanes else (b * self.heads + h, i, 0)

        return pl.BlockSpec((None, count, self.width), place)

    def rows(self, count: int, *, walks: bool):
        return pl.BlockSpec(
            (None, 1, count), lambda b, h, i: (b * self.heads + h, 0, i if walks else 0)
        )


def _divisor(tokens: int, limit: int) -> int:
    """The largest multiple of 128 that divides `tokens` and does not exceed `limit`."""
    blocks = tokens // LANES
    return LANES * max(n for n in range(1, max(limit // LANES, 1) + 1) if blocks % n == 0)


def _padded(tokens: int) -> int:
    return tokens + -tokens % LANES


def _options(products: int, query, keys: int, semantics: tuple[str, str, str], interpret: bool):
    """Arguments of every pallas_call, with a cost estimate for XLA's scheduler."""
    batch, queries, heads, width = query.shape
    scores = batch * heads * queries * keys
    return {
        "interpret": interpret,
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES
        ),
        "cost_estimate": pl.CostEstimate(
            flops=2 * products * scores * width,
            transcendentals=scores,
            bytes_accessed=2 * products * batch * heads * max(queries, keys) * width * 2,
        ),
    }


def forward(query, key, value, mask, *tangents, blocks: Blocks, interpret: bool):
    """Output and log-sum-exp; given the tangents of query, key and value, theirs as well."""
    arrays = _Arrays(query, key)
    queries, keys = _padded(arrays.queries), _padded(arrays.keys)
    block = _divisor(queries, blocks.kept)
    bias = arrays.bias(mask)
    of_query = arrays.tokens(block, walks=True)
    of_keys = arrays.tokens(keys, walks=False)
    operands = [arrays.pack(x) for x in (query, key, value)]
    specs = [of_query, of_keys, of_keys]
    if bias is not None:
        operands.append(bias[:, None, :])
        specs.append(pl.BlockSpec((None, 1, keys), lambda b, h, i: (b, 0, 0)))
    operands += [arrays.pack(x) for x in tangents]
    specs += [of_query, of_keys, of_keys][: len(tangents)]
    shapes = [
        result_of(query, operands[0].shape, value.dtype),
        result_of(query, (arrays.batch * arrays.heads, 1, queries), jnp.float32),
    ]
    results = [of_query, arrays.rows(block, walks=True)]
    copies = 2 if tangents else 1
    kernel = functools.partial(
        forward_tangent_kernel if tangents else forward_kernel,
        masked=bias is not None,
        scale=arrays.width**-0.5,
        loop=functools.partial(_over_chunks, chunk=min(blocks.looped, keys)),
        stored=_as_row,
    )
    out = pl.pallas_call(
        kernel,
        grid=(arrays.batch, arrays.heads, queries // block),
        in_specs=specs,
        out_specs=results * copies,
        out_shape=shapes * copies,
        name="attention_with_tangent" if tangents else "attention",
        **_options(6 if tangents else 2, query, keys, ("parallel",) * 3, interpret),
    )(*operands)
    unpack = (arrays.unpack, arrays.unpack_rows) * copies
    return tuple(of(x, arrays.queries) for of, x in zip(unpack, out))


def backward(query, key, value, mask, lse, delta, cotangent, *, blocks: Blocks, interpret: bool):
    """Cotangents of query, key and value; see `blocked.backward`."""
    arrays = _Arrays(query, key)
    queries, keys = _padded(arrays.queries), _padded(arrays.keys)
    block = _divisor(keys, blocks.kept)
    bias = arrays.bias(mask)
    of_queries = arrays.tokens(queries, walks=False)
    of_key = arrays.tokens(block, walks=True)
    of_rows = arrays.rows(queries, walks=False)
    operands = [arrays.pack(x) for x in (query, key, value)]
    specs = [of_queries, of_key, of_key]
    if bias is not None:
        operands.append(bias[:, :, None])
        specs.append(pl.BlockSpec((None, block, 1), lambda b, h, i: (b, i, 0)))
    operands += [arrays.pack_rows(lse), arrays.pack_rows(delta), arrays.pack(cotangent)]
    specs += [of_rows, of_rows, of_queries]
    kernel = functools.partial(
        _backward_kernel,
        masked=bias is not None,
        chunk=min(blocks.looped, queries),
        scale=arrays.width**-0.5,
    )
    d_query, d_key, d_value = pl.pallas_call(
        kernel,
        grid=(arrays.batch, arrays.heads, keys // block),
        in_specs=specs,
        out_specs=[of_queries, of_key, of_key],
        out_shape=[result_of(query, x.shape, x.dtype) for x in operands[:3]],
        scratch_shapes=[pltpu.VMEM((queries, arrays.width), jnp.float32)],
        name="attention_backward",
        **_options(5, query, keys, ("parallel", "parallel", "arbitrary"), interpret),
    )(*operands)
    return (
        arrays.unpack(d_query, arrays.queries),
        arrays.unpack(d_key, arrays.keys),
        arrays.unpack(d_value, arrays.keys),
    )
