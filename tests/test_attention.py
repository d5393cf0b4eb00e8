"""Attention and its derivatives are those of softmax attention, accumulated in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_distill.ops.attention.attention import attention


def inputs(dtype=jnp.float32, batch=2, queries=5, keys=7, heads=3, width=8):
    """Query, key and value, and tangents of them."""
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads, width) for n in (queries, keys, keys)]
    first, second = ([rng.standard_normal(shape) for shape in shapes] for _ in range(2))
    return [tuple(jnp.asarray(array, dtype) for array in arrays) for arrays in (first, second)]


def softmax_attention(query, key, value):
    """In numpy, float64, one head of one sample at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.empty((*query.shape[:-1], value.shape[-1]))
    for sample, head in np.ndindex(query.shape[0], query.shape[2]):
        scores = query[sample, :, head] @ key[sample, :, head].T / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[sample, :, head] = weights @ value[sample, :, head]
    return out


@pytest.mark.parametrize("large", [1.0, 100.0])
def test_forward(large):
    (query, key, value), _ = inputs()
    query = large * query
    error = np.abs(attention(query, key, value) - softmax_attention(query, key, value)).max()
    assert error <= 2e-6 * large


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        arrays, _ = inputs(jnp.float64)
        out = attention(*arrays)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, softmax_attention(*arrays), rtol=1e-12, atol=1e-14)


def test_jvp_is_the_finite_difference():
    with jax.enable_x64(True):
        arrays, tangents = inputs(jnp.float64)
        out, tangent = jax.jvp(attention, arrays, tangents)
        step = 1e-5
        ahead, behind = (
            softmax_attention(
                *(x + sign * step * dx for x, dx in zip(arrays, tangents, strict=True))
            )
            for sign in (1, -1)
        )
        np.testing.assert_allclose(out, softmax_attention(*arrays), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), rtol=1e-8, atol=1e-9)


def test_vjp_is_the_transpose_of_the_jvp():
    with jax.enable_x64(True):
        arrays, tangents = inputs(jnp.float64)

        @jax.jit
        def products(arrays, tangents):
            out, tangent = jax.jvp(attention, arrays, tangents)
            cotangent = jnp.cos(out)
            gradients = jax.vjp(attention, *arrays)[1](cotangent)
            pulled = sum(jnp.vdot(g, dx) for g, dx in zip(gradients, tangents, strict=True))
            return pulled, jnp.vdot(cotangent, tangent)

        np.testing.assert_allclose(*products(arrays, tangents), rtol=1e-12)


def test_gradient_beside_a_stopped_tangent_is_the_plain_gradient():
    arrays, tangents = inputs()

    def with_tangent(*arrays):
        out, tangent = jax.jvp(attention, arrays, tangents)
        tangent = jax.lax.stop_gradient(tangent)
        return jnp.sum(out * jnp.sin(tangent)), tangent

    def plain(tangent, *arrays):
        return jnp.sum(attention(*arrays) * jnp.sin(tangent))

    @jax.jit
    def both(*arrays):
        one, tangent = jax.grad(with_tangent, (0, 1, 2), has_aux=True)(*arrays)
        return one, jax.grad(plain, (1, 2, 3))(tangent, *arrays)

    for one, other in zip(*both(*arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_bfloat16_inputs():
    arrays, tangents = inputs(jnp.bfloat16)
    out, tangent = jax.jvp(attention, arrays, tangents)
    assert out.dtype == tangent.dtype == jnp.bfloat16
    expected = softmax_attention(*arrays)
    assert np.abs(np.asarray(out, np.float64) - expected).max() <= 2**-7 * np.abs(expected).max()


def test_bfloat16_scores_are_summed_in_float32():
    """Scores of 1024 / 32 and 1023 / 32: in bfloat16, 1023 rounds to 1024."""
    query = jnp.ones((1, 1, 1, 1024), jnp.bfloat16)
    key = jnp.ones((1, 2, 1, 1024), jnp.bfloat16).at[0, 1, 0, 0].set(0)
    value = jnp.asarray([[1.0], [0.0]], jnp.bfloat16).reshape(1, 2, 1, 1)
    assert abs(float(attention(query, key, value)[0, 0, 0, 0]) - 1 / (1 + np.exp(-1 / 32))) < 2**-9


def test_bfloat16_values_are_summed_in_float32():
    """In bfloat16 a sum of 2048 equal terms stops growing at an eighth."""
    query, key, value = (jnp.ones((1, n, 1, 4), jnp.bfloat16) for n in (1, 2048, 2048))
    np.testing.assert_array_equal(attention(query, key, value), 1.0)
