"""A time embedder of t and the one of 1000 t that is made of it are one function."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_distill.interop import time_scale
from jax_distill.models.mmdit import MMDiTConfig, time_embedding
from jax_distill.objectives.time_rescale import refit_time_embedder

T = np.random.default_rng(1).uniform(size=64).astype(np.float32)


def config(scale):
    return MMDiTConfig(
        num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6), time_scale=scale
    )


def random_embedder(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        f"linear_{number}": {
            "kernel": (rng.standard_normal((inputs, 32)) * inputs**-0.5).astype(dtype),
            "bias": rng.standard_normal(32).astype(dtype),
        }
        for number, inputs in ((1, 256), (2, 32))
    }


def difference(first, first_scale, second, second_scale):
    values = [
        np.asarray(time_embedding(config(scale), embedder, jnp.asarray(T)))
        for embedder, scale in ((first, first_scale), (second, second_scale))
    ]
    return np.abs(values[0] - values[1]).max() / np.sqrt(np.mean(values[0] ** 2))


def test_any_embedder_of_t_is_one_of_1000_t():
    old = random_embedder()
    new = time_scale.refit(config(1.0), old, 1000.0)
    assert difference(old, 1.0, new.embedder, 1000.0) < 1e-4
    assert new.residual < 1e-4
    assert new.embedder["linear_2"] == old["linear_2"]


def test_what_the_rescale_refits_comes_back():
    """Its ramps are steep: they show the rounding of the time, and are made no steeper."""
    old = random_embedder()
    rescaled = refit_time_embedder(lambda t: time_embedding(config(1000.0), old, t), 32)
    new = time_scale.refit(config(1.0), rescaled, 1000.0)
    assert difference(rescaled, 1.0, new.embedder, 1000.0) < 1e-3
    steepest = np.abs(rescaled["linear_1"]["kernel"]).max()
    assert np.abs(new.embedder["linear_1"]["kernel"]).max() <= steepest * (1 + 1e-6)


def test_the_residual_tells_what_is_lost():
    old = random_embedder()
    new = time_scale.refit(config(1000.0), old, 1.0)  # t has no features that fast
    assert new.residual > 0.1
    assert new.residual >= difference(old, 1000.0, new.embedder, 1.0) * 0.5


def test_types_are_kept():
    new = time_scale.refit(config(1.0), random_embedder(ml_dtypes.bfloat16), 1000.0)
    assert new.embedder["linear_1"]["kernel"].dtype == ml_dtypes.bfloat16
    assert 1e-4 < new.residual < 0.1  # of rounding


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_same_scale_changes_nothing(scale):
    old = random_embedder()
    assert time_scale.refit(config(scale), old, scale).residual < 1e-6
