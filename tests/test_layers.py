"""Attention with bias and mask, types that stay wide, and stacks that are their blocks in a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_distill.models.layers import Layers, attend, scan, split_heads
from jax_distill.models.sizes import check_sizes
from jax_distill.ops.attention.attention import attention


def _heads(dtype=np.float32):
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((2, 5, 3, 4)).astype(dtype) for _ in range(3))


def test_attention_without_bias_and_mask_is_the_plain_one():
    query, key, value = _heads()
    plain = attention(query, key, value).reshape(2, 5, 12)
    np.testing.assert_allclose(attend(query, key, value, scale=0.5), plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(split_heads(plain, 3, np.float32).reshape(2, 5, 12), plain)


def test_a_hidden_key_is_one_that_is_not_there():
    query, key, value = _heads()
    bias = np.random.default_rng(1).standard_normal((1, 3, 5, 5)).astype("f4")
    mask = np.array([True, True, False, True, False])
    hidden = attend(query, key, value, bias=bias, mask=mask[None, None, None])
    shorter = attend(query, key[:, mask], value[:, mask], bias=bias[..., mask])
    np.testing.assert_allclose(hidden, shorter, rtol=1e-5, atol=1e-6)
    minus_infinity = np.where(mask, bias, -np.inf)
    np.testing.assert_allclose(
        hidden, attend(query, key, value, bias=minus_infinity), rtol=1e-5, atol=1e-6
    )


def test_scores_beyond_float16_are_told_apart():
    query, key, value = _heads(np.float16)
    ours = attend(300 * query, 300 * key, value)
    assert ours.dtype == jnp.float32
    wide = (x.astype(np.float32) for x in (300 * query, 300 * key, value))
    np.testing.assert_allclose(ours, attend(*wide), atol=2e-3)


class Affine(nnx.Module):
    def __init__(self, layers):
        self.linear = layers.linear(4, 4, bias=True)
        self.norm = layers.rms_norm(4, 1e-6)

    def __call__(self, x, shift):
        return self.norm(self.linear(x)) + shift


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_stack_is_its_blocks_one_after_another(dtype):
    blocks = Layers(nnx.Rngs(0), dtype, jnp.float32).stack(Affine, 3)
    kernels = blocks.linear.kernel[...]
    assert kernels.shape == (3, 4, 4) and kernels.dtype == jnp.float32
    assert not np.allclose(kernels[0], kernels[1])
    x = np.random.default_rng(0).standard_normal((2, 4)).astype("f4")
    result = scan(blocks, jnp.asarray(x), 0.5)
    assert result.dtype == jnp.float32
    for kernel in kernels:
        x = x @ np.asarray(kernel)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True)) + 0.5
    bound = {jnp.float32: 1e-4, jnp.bfloat16: 5e-2, jnp.float16: 5e-3}[dtype]
    error = np.abs(result - x).max()
    assert error < bound and (error > bound / 100 or dtype == jnp.float32)


def test_sizes_are_positive_integers():
    config = jax.ShapeDtypeStruct((1, 2), np.float32)  # anything with fields
    check_sizes(config, ["ndim", "size"])
    with pytest.raises(ValueError, match=r"shape: \(1, 2\) is not an integer of at least 1"):
        check_sizes(config, ["ndim", "shape"])
