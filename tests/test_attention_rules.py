"""Attention composes: what is differentiated, how often, under what; and what it costs."""

import collections
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jax_distill.devices import sharding
from jax_distill.ops.attention import formulas, lowering, rules
from jax_distill.ops.attention.attention import attention, plain
from jax_distill.ops.attention.signatures import SIGNATURES
from jax_distill.planning import flops
from jax_distill.planning.flops import count_flops

BATCH, TOKENS, HEADS, WIDTH, LAYERS = 2, 6, 2, 4, 2
PRODUCT = 2 * BATCH * HEADS * TOKENS * TOKENS * WIDTH

blocked = functools.partial(attention, implementation="blocked")


def heads(seed=0, dtype=jnp.float32, tokens=TOKENS):
    """Query, key, value and tangents of them."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, tokens, HEADS, WIDTH)
    return [tuple(jnp.asarray(rng.standard_normal(shape), dtype) for _ in "qkv") for _ in "pt"]


def network(remat, x, weights):
    """Layers of attention without any other matrix product. x: (B, N, H D)."""

    def layer(x, weight):
        hidden = (x * weight).reshape(BATCH, TOKENS, HEADS, WIDTH)
        attended = blocked(hidden, 2 * hidden, jnp.sin(hidden))
        return x + attended.reshape(x.shape), None

    if remat is not None:
        layer = jax.checkpoint(layer, policy=remat, prevent_cse=False)
    return jax.lax.scan(layer, x, weights)[0]


def training_loss(remat, weights, x, dx):
    """As sCM's and MeanFlow's: of the output and of its tangent, stopped."""
    output, tangent = jax.jvp(lambda x: network(remat, x, weights), (x,), (dx,))
    return jnp.sum(jnp.square(output - jax.lax.stop_gradient(output - tangent)))


def executed(function, *arguments):
    """How often each matrix product or attention primitive runs, in the jaxpr as it is traced."""
    counts = collections.Counter()

    def add(jaxpr, times):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name in (*SIGNATURES, "dot_general"):
                counts[name] += times
            inner = times * (equation.params["length"] if name == "scan" else 1)
            for body in flops._jaxprs(equation.params):
                add(body, inner)

    add(jax.make_jaxpr(function)(*arguments).jaxpr, 1)
    return {name: count / LAYERS for name, count in counts.items()}


X = jnp.ones((BATCH, TOKENS, HEADS * WIDTH))
WEIGHTS = jnp.ones((LAYERS, HEADS * WIDTH))
NOTHING = jax.checkpoint_policies.nothing_saveable
EVERYTHING = jax.checkpoint_policies.everything_saveable


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["", "jit"])
@pytest.mark.parametrize(
    ("remat", "again"),
    [(None, {}), (EVERYTHING, {}), (NOTHING, {"attention": 1})],
    ids=["kept", "all_saveable", "rematerialised"],
)
def test_a_training_step_runs_each_once(wrap, remat, again):
    """Forward and tangent in one, one backward, nothing of second order; not even as dead code."""
    gradient = wrap(jax.grad(functools.partial(training_loss, remat)))
    once = {"attention_with_tangent": 1, "attention_backward": 1}
    assert executed(gradient, WEIGHTS, X, X) == once | again
    batched = jax.vmap(gradient, (None, 0, 0))
    assert executed(batched, WEIGHTS, X[None], X[None]) == once | again


def test_plain_derivatives_run_nothing_else():
    def output(weights):
        return network(None, X, weights)

    assert executed(output, WEIGHTS) == {"attention": 1}
    assert executed(lambda w: jax.jvp(output, (w,), (w,)), WEIGHTS) == {"attention_with_tangent": 1}
    gradient = jax.grad(lambda w: output(w).sum())
    assert executed(gradient, WEIGHTS) == {"attention": 1, "attention_backward": 1}


def test_gradients_of_a_training_step_are_those_of_plain_attention():
    rng = np.random.default_rng(0)
    x, dx = (jnp.asarray(rng.standard_normal(X.shape), jnp.float32) for _ in "xd")
    weights = jnp.asarray(rng.standard_normal(WEIGHTS.shape), jnp.float32)

    def reference(weights):
        def layers(x):
            for weight in weights:
                hidden = (x * weight).reshape(BATCH, TOKENS, HEADS, WIDTH)
                x = x + plain(hidden, 2 * hidden, jnp.sin(hidden)).reshape(x.shape)
            return x

        output, tangent = jax.jvp(layers, (x,), (dx,))
        return jnp.sum(jnp.square(output - jax.lax.stop_gradient(output - tangent)))

    @jax.jit
    def all_three(weights):
        losses = (reference, *(lambda w, r=r: training_loss(r, w, x, dx) for r in (None, NOTHING)))
        return [jax.grad(loss)(weights) for loss in losses]

    expected, *found = all_three(weights)
    for gradient in found:
        np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-5)


def second_derivatives(function, primals, tangents):
    """Forward and reverse mode in all four orders, nothing stopped."""

    def scalar(*primals):
        return jnp.sum(jnp.sin(function(*primals)))

    def moved(*primals):
        return jax.jvp(function, primals, tangents)[1]

    def rotated(*primals):
        return jnp.sum(jnp.cos(moved(*primals)) * function(*primals))

    gradient = jax.grad(scalar, (0, 1, 2))
    return (
        jax.jvp(moved, primals, tangents[::-1]),
        jax.grad(rotated, (0, 1, 2))(*primals),
        jax.jvp(gradient, primals, tangents)[1],
        jax.grad(lambda *p: sum(jnp.vdot(*z) for z in zip(gradient(*p), tangents)), (0, 1, 2))(
            *primals
        ),
    )


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_full_second_derivatives(masked):
    mask = jnp.arange(TOKENS)[None] < jnp.asarray([TOKENS, 4])[:, None] if masked else None
    with jax.enable_x64(True):
        primals, tangents = heads(dtype=jnp.float64)
        found, expected = (
            jax.jit(functools.partial(second_derivatives, functools.partial(f, mask=mask)))(
                primals, tangents
            )
            for f in (blocked, plain)
        )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), found, expected
        )


def test_linearize_and_its_transpose():
    primals, tangents = heads()
    output, tangent = jax.jvp(blocked, primals, tangents)
    linear_output, linear = jax.linearize(blocked, *primals)
    np.testing.assert_allclose(linear_output, output, rtol=1e-6)
    np.testing.assert_allclose(linear(*tangents), tangent, rtol=1e-4, atol=1e-5)
    gradients = jax.linear_transpose(linear, *tangents)(output)
    for found, expected in zip(gradients, jax.vjp(blocked, *primals)[1](output)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_vmap_is_a_loop():
    """Over a leading axis of queries, a trailing one of keys, and values that have none."""
    (query, key, value), tangents = heads()
    queries, keys = jnp.stack([query, -query, 2 * query]), jnp.stack([key, key + 1, -key], -1)

    def derivatives(query, key, value):
        output, tangent = jax.jvp(blocked, (query, key, value), tangents)
        return output, tangent, jax.vjp(blocked, query, key, value)[1](tangent)

    batched = jax.jit(jax.vmap(derivatives, (0, 3 + 1, None)))(queries, keys, value)
    derivatives = jax.jit(derivatives)
    for i in range(3):
        jax.tree.map(
            lambda many, one: np.testing.assert_allclose(many[i], one, rtol=1e-4, atol=1e-5),  # noqa: B023
            batched,
            derivatives(queries[i], keys[..., i], value),
        )


@pytest.mark.parametrize("implementation", ["blocked", "pallas_tpu", "pallas_gpu"])
def test_under_shard_map(implementation):
    rng = np.random.default_rng(0)
    primals, tangents = (
        tuple(jnp.asarray(rng.standard_normal((2, 32, 1, 64)), jnp.float32) for _ in "qkv")
        for _ in "pt"
    )
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    spec = PartitionSpec(("data", "fsdp"), None, "tensor", None)

    def derivatives(function, primals, tangents):
        output, tangent = jax.jvp(function, primals, tangents)
        return output, jax.vjp(function, *primals)[1](tangent)

    fused = functools.partial(
        derivatives, functools.partial(attention, implementation=implementation)
    )
    mapped = jax.shard_map(fused, mesh=mesh, in_specs=spec, out_specs=spec)
    found = jax.jit(mapped)(primals, tangents)
    expected = jax.jit(functools.partial(derivatives, plain))(primals, tangents)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected
    )


def test_the_mesh_axes_are_those_of_parallel():
    assert lowering.MESH_AXES["b"] == sharding.BATCH[0]
    assert lowering.MESH_AXES["h"] == sharding.MESH_AXES["heads"]


def test_flops():
    primals, tangents = heads()

    def tangent(function):
        return lambda *primals: jax.jvp(function, primals, tangents)

    def gradient(function):
        def both(*primals):
            output, pull = jax.vjp(function, *primals)
            return output, pull(primals[0])

        return both

    assert count_flops(blocked, *primals) == count_flops(plain, *primals) == 2 * PRODUCT
    assert count_flops(tangent(blocked), *primals) == 6 * PRODUCT
    assert count_flops(tangent(plain), *primals) == 6 * PRODUCT
    # Scores are made again rather than kept: one product more than plain attention's.
    assert count_flops(gradient(blocked), *primals) == (2 + 5) * PRODUCT
    assert count_flops(gradient(plain), *primals) == (2 + 4) * PRODUCT
    step = jax.grad(functools.partial(training_loss, None))
    assert count_flops(step, WEIGHTS, X, X) == LAYERS * (6 + 5) * PRODUCT
    remat = jax.grad(functools.partial(training_loss, NOTHING))
    assert count_flops(remat, WEIGHTS, X, X) == LAYERS * (6 + 2 + 5) * PRODUCT


def test_flops_of_the_curvature():
    inputs, tangents = heads()
    lse = jnp.zeros((BATCH, HEADS, TOKENS))
    operands = (*inputs, lse, *tangents, *tangents, lse)

    def fused(*operands):
        bind = rules.attention_curvature_p.bind
        return bind(*operands, implementation="blocked", masked=False)

    def written_out(*operands):
        return formulas.curvature(*operands[:3], None, *operands[3:])

    assert count_flops(fused, *operands) == count_flops(written_out, *operands) == 10 * PRODUCT


def lowered(platform, *, implementation="auto", tokens=1024, width=64, dtype=jnp.bfloat16):
    x = jax.ShapeDtypeStruct((1, tokens, 1, width), dtype)

    def step(*primals):
        def with_tangent(*primals):
            output, tangent = jax.jvp(function, primals, primals)
            return output, jax.lax.stop_gradient(tangent)

        function = functools.partial(attention, implementation=implementation)
        output, pull = jax.vjp(with_tangent, *primals)
        return output, pull(output)

    return jax.jit(step).trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tokens", [1024 + 256, 1000 + 77])
def test_kernels_are_lowered_for_gpus(width, tokens):
    assert lowered("cuda", width=width, tokens=tokens).count("__gpu$xla.gpu.triton") == 3


def test_auto_is_plain_for_few_tokens_and_blocked_on_cpus():
    assert "custom_call" not in lowered("cuda", tokens=256)
    assert "while" not in lowered("cpu", tokens=256)
    assert "while" in lowered("cpu")


def test_auto_falls_back_with_one_log_line(caplog):
    lowering._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert "triton" not in lowered("cuda", width=80)
    assert [record.message for record in caplog.records] == [
        "attention: on cuda 'blocked' in place of pallas_gpu, which takes heads of 32, 64, 128"
        " channels, not 80"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "flash"}, "'flash' is not one of auto, xla, blocked"),
        ({"implementation": "pallas_tpu"}, "takes heads of 64, 128, 192 or 256 channels, not 4"),
        ({"mask": jnp.ones((BATCH, 5), bool)}, r"mask \(2, 5\) of bool must be \(2, 6\) of bool"),
        ({"mask": jnp.ones((BATCH, TOKENS))}, "of float32 must be"),
    ],
)
def test_errors(options, message):
    primals, _ = heads()
    with pytest.raises(ValueError, match=message):
        attention(*primals, **options)


def test_shapes_that_do_not_fit():
    (query, key, value), _ = heads()
    with pytest.raises(ValueError, match=r"must be \(B, N, H, D\), \(B, M, H, D\), \(B, M, H, E\)"):
        attention(query, key[:, :5], value)
