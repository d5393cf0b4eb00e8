"""An embedder of a scalar, and the one of the scalar times another factor, are one function."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_distill.interop import time_scale
from jax_distill.models.mmdit import scalar_embedding

X = np.random.default_rng(1).uniform(size=64).astype(np.float32)


def random_embedder(dtype=np.float32, hidden=32):
    rng = np.random.default_rng(0)
    return {
        f"linear_{number}": {
            "kernel": (rng.standard_normal((inputs, hidden)) * inputs**-0.5).astype(dtype),
            "bias": rng.standard_normal(hidden).astype(dtype),
        }
        for number, inputs in ((1, 256), (2, hidden))
    }


def embed(embedder, factor, x):
    embedder = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), embedder)
    return np.asarray(scalar_embedding(embedder, jnp.asarray(factor * x, jnp.float32)))


def difference(first, factor, second, other, x):
    """The largest, relative to the variation of the first."""
    values = embed(first, factor, x), embed(second, other, x)
    return np.abs(values[0] - values[1]).max() / values[0].std(axis=0).mean()


@pytest.mark.parametrize("upper", [1.0, 10.0])  # of times, and of guidance scales
def test_any_embedder_of_x_is_one_of_1000_x(upper):
    old = random_embedder()
    new = time_scale.refit(old, 1.0, 1000.0, upper)
    assert difference(old, 1.0, new.embedder, 1000.0, upper * X) < 2e-4
    assert new.residual < 2e-4
    np.testing.assert_array_equal(
        new.embedder["linear_2"]["kernel"], old["linear_2"]["kernel"]
    )  # the first layer alone changes


def test_ramps_of_the_rescale_are_had_and_made_no_steeper():
    """They show the rounding of the time: silu(+-20 (sin t - sin c)), see `time_rescale`."""
    old, sine = random_embedder(), 128
    slope = np.where(np.arange(32) % 2, 20.0, -20.0)
    kernel = np.zeros((256, 32))
    kernel[sine] = slope
    old["linear_1"] = {"kernel": kernel, "bias": -slope * np.sin(np.linspace(0, 1, 32))}
    new = time_scale.refit(old, 1.0, 1000.0)
    assert difference(old, 1.0, new.embedder, 1000.0, X) < 2e-3
    assert np.abs(new.embedder["linear_1"]["kernel"]).max() <= 20 * (1 + 1e-6)


def test_the_residual_tells_what_is_lost():
    old = random_embedder()
    new = time_scale.refit(old, 1000.0, 1.0)  # t has no features that fast
    assert new.residual > 0.1
    assert new.residual >= difference(old, 1000.0, new.embedder, 1.0, X) * 0.5


def test_narrow_parameters_lose_nothing():
    old = random_embedder(ml_dtypes.bfloat16)
    new = time_scale.refit(old, 1.0, 1000.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(new.embedder)} == {np.dtype(np.float32)}
    assert difference(old, 1.0, new.embedder, 1000.0, X) < 2e-4


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_the_same_factor_changes_nothing(factor):
    old = random_embedder()
    assert time_scale.refit(old, factor, factor).residual < 1e-5


SCALES = np.arange(21, dtype=np.float32) / 2
SLOW = np.tile(np.arange(128) > 96, 2)[:, None]  # features that turn by 10 or less over [0, 10]


def smooth_embedder(hidden):
    embedder = random_embedder(hidden=hidden)
    embedder["linear_1"]["kernel"] = np.where(SLOW, embedder["linear_1"]["kernel"], 0)
    return embedder


@pytest.mark.parametrize("hidden", [32, 256])
def test_any_embedder_of_1000_w_is_one_of_w_at_round_values(hidden):
    old = random_embedder(hidden=hidden)
    new = time_scale.rebuild(old, 1000.0, 1.0, 10.0)
    found = difference(old, 1000.0, new.embedder, 1.0, SCALES)
    print(f"{hidden} units: off by {found:.1e}, in between {new.between:.1e}")
    assert new.step == 0.5 and found < 5e-3 and new.residual < 5e-3
    assert new.between > 1  # a random one turns a thousand times as fast


@pytest.mark.parametrize("hidden", [32, 256])
def test_a_smooth_embedder_is_the_same_in_between(hidden):
    new = time_scale.rebuild(smooth_embedder(hidden), 1000.0, 1.0, 10.0)
    print(f"{hidden} units: off by {new.residual:.1e}, in between {new.between:.1e}")
    assert new.residual < 2e-3 and new.between < {32: 1.0, 256: 0.4}[hidden]


@pytest.mark.parametrize("make", [random_embedder, smooth_embedder])
def test_what_is_rebuilt_stands_bfloat16(make):
    """As T2I-Distill evaluates it: parameters, features and what is between in bfloat16."""
    old = make(hidden=256)
    new = time_scale.rebuild(old, 1000.0, 1.0, 10.0)

    def narrow(x):
        return jnp.asarray(x).astype(jnp.bfloat16)

    first, second = (jax.tree.map(narrow, new.embedder[f"linear_{i}"]) for i in (1, 2))
    angles = SCALES[:, None] * 10000.0 ** (-np.arange(128) / 128)
    features = narrow(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))

    def linear(x, layer):  # whose sums are wide, as they are in torch
        total = jnp.dot(x, layer["kernel"], preferred_element_type=jnp.float32)
        return narrow(total + layer["bias"].astype(jnp.float32))

    found = linear(jax.nn.silu(linear(features, first)), second).astype(np.float32)
    expected = embed(old, 1000.0, SCALES)
    error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std(axis=0).mean()
    print(f"off by {error:.3f} of the variation")
    assert error < 0.1


def test_an_embedder_that_adds_nothing_stays_so():
    old = random_embedder()
    old["linear_2"] = jax.tree.map(np.zeros_like, old["linear_2"])
    new = time_scale.rebuild(old, 1000.0, 1.0, 10.0)
    assert not embed(new.embedder, 1.0, 10 * X).any() and new.residual == new.between == 0
