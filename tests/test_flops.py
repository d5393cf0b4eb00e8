"""Counted FLOPs are those of the shapes, whatever JAX wraps around the products."""

import jax
import jax.numpy as jnp
import pytest

from jax_distill.planning.flops import count_flops

M, K, N, LAYERS = 3, 5, 7, 4
PRODUCT = 2 * M * K * N


def shape(*dimensions: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dimensions, jnp.float32)


LEFT, RIGHT, SQUARE = shape(M, K), shape(K, N), shape(K, K)
SQUARE_PRODUCT = 2 * M * K * K


def test_matrix_products():
    assert count_flops(jnp.matmul, LEFT, RIGHT) == PRODUCT
    assert count_flops(jnp.matmul, shape(2, 9, M, K), shape(9, K, N)) == 18 * PRODUCT
    attention_scores = count_flops(
        lambda q, k: jnp.einsum("bnhd,bmhd->bhnm", q, k), shape(2, 6, 3, 8), shape(2, 9, 3, 8)
    )
    assert attention_scores == 2 * (2 * 3) * 6 * 9 * 8
    assert count_flops(lambda x: jnp.sin(x) * x, LEFT) == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    def convolve(images, kernel):
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            (2, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    counted = count_flops(convolve, shape(2, 8, 6, 4), shape(3, 5, 4 // groups, 10))
    assert counted == 2 * (2 * 4 * 6 * 10) * (3 * 5 * 4 // groups)


def layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_scan_counts_every_step():
    weights = shape(LAYERS, K, K)
    assert count_flops(layers, LEFT, weights) == LAYERS * SQUARE_PRODUCT
    both = count_flops(lambda x, w: layers(layers(x, w), w), LEFT, weights)
    assert both == 2 * LAYERS * SQUARE_PRODUCT


def test_derivatives():
    weights = shape(LAYERS, K, K)
    forward = count_flops(layers, LEFT, weights)

    def tangent(x, w):
        return jax.jvp(lambda x: layers(x, w), (x,), (x,))

    def gradient(function):
        return jax.grad(lambda x, w: function(x, w).sum(), argnums=(0, 1))

    def rematerialised(x, w):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
        return jax.lax.scan(step, x, w)[0]

    assert count_flops(tangent, LEFT, weights) == 2 * forward
    assert count_flops(gradient(layers), LEFT, weights) == 3 * forward
    assert count_flops(gradient(rematerialised), LEFT, weights) == 4 * forward


def test_calls_and_branches():
    jitted = jax.jit(jax.checkpoint(jnp.matmul))
    assert count_flops(jax.vmap(jitted, (None, 0)), LEFT, shape(6, K, N)) == 6 * PRODUCT

    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert count_flops(branch, LEFT, SQUARE) == 2 * SQUARE_PRODUCT


def test_what_no_output_needs_is_left_out():
    def unused(x, w):
        x @ w
        return jax.jit(lambda: (x @ w, x @ w @ w))()[0]

    assert count_flops(unused, LEFT, SQUARE) == SQUARE_PRODUCT


def test_unknown_repetitions_are_refused():
    def loop(x, w, steps):
        return jax.lax.fori_loop(0, steps, lambda _, x: x @ w, x)

    with pytest.raises(ValueError, match="within a 'while'"):
        count_flops(loop, LEFT, SQUARE, jax.ShapeDtypeStruct((), jnp.int32))
