"""Every implementation of attention is the formula in float64, to rounding; kernels interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_distill.ops.attention.attention import attention, plain

FUSED = ("blocked", "pallas_tpu", "pallas_gpu")
NAMES = ("output", "tangent", "d_query", "d_key", "d_value")


def arrays(batch, queries, keys, heads, width, spread=0.0):
    """Query, key, value; their tangents; a cotangent; a mask. float64, in numpy.

    `spread` moves the tangents of all scores of a query by one large amount, which the tangent of
    the output does not see.
    """
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads, width) for n in (queries, keys, keys, queries, keys, keys, queries)]
    made = [rng.standard_normal(shape) for shape in shapes]
    made[1][..., 0] = 1 if spread else made[1][..., 0]
    made[3][..., 0] += spread
    mask = rng.random((batch, keys)) < 0.7
    mask[:, 0] = True
    return made, mask


def everything(function, query, key, value, d_query, d_key, d_value, cotangent):
    """What a training step takes from attention."""
    primals = (query, key, value)
    output, tangent = jax.jvp(function, primals, (d_query, d_key, d_value))
    return output, tangent, *jax.vjp(function, *primals)[1](cotangent)


def computed(function, made, mask, dtype):
    made = [jnp.asarray(x, dtype) for x in made]
    mask = None if mask is None else jnp.asarray(mask)
    return jax.jit(functools.partial(everything, functools.partial(function, mask=mask)))(*made)


@functools.cache
def expected(masked, *sizes):
    made, mask = arrays(*sizes)
    with jax.enable_x64(True):
        return [np.asarray(x) for x in computed(plain, made, mask if masked else None, jnp.float64)]


def relative(found, reference):
    """Size of the error over the size of what is right, in the Euclidean norm."""
    return np.linalg.norm(np.asarray(found, np.float64) - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize("implementation", FUSED)
@pytest.mark.parametrize(
    ("masked", "sizes"),
    [
        (False, (1, 1077, 1077, 1, 128)),  # a multiple of no block
        (True, (2, 130, 700, 2, 64)),
    ],
    ids=["1077", "masked"],
)
def test_float32(implementation, masked, sizes):
    made, mask = arrays(*sizes)
    function = functools.partial(attention, implementation=implementation)
    found = computed(function, made, mask if masked else None, jnp.float32)
    for name, x, reference in zip(NAMES, found, expected(masked, *sizes)):
        assert relative(x, reference) <= 1e-6, name


def test_bfloat16_is_as_good_as_plain_attention():
    """The spread would drown the tangent if weights were not centred before they are rounded."""
    sizes = (1, 256, 384, 2, 64, 8.0)
    made, _ = arrays(*sizes)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in made]
    with jax.enable_x64(True):
        reference = [np.asarray(x) for x in computed(plain, rounded, None, jnp.float64)]
    usual = computed(plain, made, None, jnp.bfloat16)
    for implementation in FUSED:
        function = functools.partial(attention, implementation=implementation)
        found = computed(function, made, None, jnp.bfloat16)
        for name, x, known, exact in zip(NAMES, found, usual, reference):
            assert x.dtype == jnp.bfloat16
            assert relative(x, exact) <= 1.5 * relative(known, exact), (implementation, name)


def test_blocked_gradients_of_bfloat16_are_as_good_as_rounding_allows():
    """Those of queries and keys: cotangents of scores are not rounded on their way."""
    shape = (1, 700, 1, 128)
    keys = jax.random.split(jax.random.key(0), 4)
    *primals, cotangent = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)

    def gradients(function, dtype):
        arrays = [x.astype(dtype) for x in (*primals, cotangent)]
        return jax.jit(lambda *a: jax.vjp(function, *a[:3])[1](a[3])[:2])(*arrays)

    found = gradients(functools.partial(attention, implementation="blocked"), jnp.bfloat16)
    for x, exact in zip(found, gradients(plain, jnp.float32)):
        rounding = relative(exact.astype(jnp.bfloat16), exact)
        assert relative(x, exact) <= 1.1 * rounding


def test_blocked_takes_float64_and_values_of_another_width():
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        shapes = [(2, 5, 3, 8), (2, 1030, 3, 8), (2, 1030, 3, 4)]
        primals, tangents = ([jnp.asarray(rng.standard_normal(s)) for s in shapes] for _ in "pt")

        def both(function):
            return jax.jit(lambda p, t: jax.jvp(function, p, t))(primals, tangents)

        found = both(functools.partial(attention, implementation="blocked"))
        for x, reference in zip(found, both(plain)):
            assert x.dtype == jnp.float64 and x.shape == (2, 5, 3, 4)
            np.testing.assert_allclose(x, reference, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("implementation", ["xla", *FUSED])
def test_masked_keys_change_nothing(implementation):
    (query, key, value, *_), _ = arrays(2, 64, 128, 1, 64)
    query, key, value = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    mask = jnp.arange(128)[None] < jnp.asarray([128, 3])[:, None]

    @jax.jit
    def output(key, value):
        return attention(query, key, value, mask=mask, implementation=implementation)

    hidden = ~mask[:, :, None, None]
    first = output(key, value)
    np.testing.assert_array_equal(first, output(key + 1e4 * hidden, value - 1e4 * hidden))
    kept = jax.jit(plain)(query[1:], key[1:, :3], value[1:, :3])
    np.testing.assert_allclose(first[1:], kept, rtol=1e-5, atol=1e-6)
