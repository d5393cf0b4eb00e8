"""Seeds and keys: every seed gives its own noise, and the settings of JAX do not."""

import contextlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from regression import Regression, Source, frozen, parameters, small_config
from test_pipeline import CAPTIONS, tiny_pipeline

import jax_distill
from jax_distill import pipeline, streams
from jax_distill.data.loader import batches
from jax_distill.training import loop
from jax_distill.worlds.shapes import renderer

EDGES = (0, 1, 2**16, 2**31 - 1, 2**31, 3_000_000_019, 2**32 - 1)
SETTINGS = {
    "enable_x64": True,
    "threefry_partitionable": False,
    "default_prng_impl": "unsafe_rbg",
    "default_matmul_precision": "bfloat16",
    "numpy_dtype_promotion": "strict",
    "numpy_rank_promotion": "raise",
    "legacy_prng_key": "error",
    "disable_jit": True,
    "debug_nans": True,
}


@contextlib.contextmanager
def of_a_user(**settings):
    """JAX with these settings, and an offset to its seeds."""
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(getattr(jax, name)(value))
        jax.config.update("jax_random_seed_offset", 3)
        try:
            yield
        finally:
            jax.config.update("jax_random_seed_offset", 0)


def test_keys_are_those_of_jax_and_differ_from_each_other():
    traced = jax.jit(streams.key)
    made = {}
    for seed in EDGES:
        data = np.asarray(jax.random.key_data(streams.key(seed)))
        np.testing.assert_array_equal(data, jax.random.key_data(jax.random.key(seed)))
        np.testing.assert_array_equal(data, jax.random.key_data(traced(np.uint32(seed))))
        made[data.tobytes()] = seed
    assert len(made) == len(EDGES)


@pytest.mark.parametrize("kind", [int, np.int64, np.uint32, np.asarray, jax.numpy.uint32])
def test_whole_numbers_of_any_type_are_seeds(kind):
    assert streams.check_seed(kind(7)) == 7


@pytest.mark.parametrize("bad", [-1, 2**32, 2**63 + 1, 1.0, "3", True, None, np.zeros(2, int)])
def test_other_values_are_no_seeds(bad):
    with pytest.raises(ValueError, match="^teacher.seed: ") as caught:
        streams.check_seed(bad, "teacher.seed")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="^seed: "):
        streams.key(bad)


def drawn(seed):
    key = jax.random.fold_in(streams.key(seed), 5)
    return np.asarray(jax.random.normal(jax.random.split(key)[0], (3, 2)))


@pytest.mark.parametrize("name", SETTINGS)
def test_noise_is_the_same_whatever_the_users_settings(name):
    expected = drawn(2**31 + 1)
    with of_a_user(**{name: SETTINGS[name]}):
        with streams.default_settings():
            found = drawn(2**31 + 1)
        assert getattr(jax.config, f"jax_{name}") == SETTINGS[name]  # it is theirs again
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_pictures_are_the_same_whatever_the_users_settings():
    pipe = tiny_pipeline("scm")
    expected = pipe(CAPTIONS, steps=2, seed=2**32 - 1)
    with of_a_user(**SETTINGS):
        again = pipeline.Pipeline(pipe.config, pipe.params)
        found = again(CAPTIONS, steps=2, seed=2**32 - 1)
    np.testing.assert_array_equal(found, expected)


def test_keys_are_made_in_one_place():
    package = Path(jax_distill.__file__).parent
    makes = re.compile(r"random\.(key|PRNGKey)\(|Rngs\((?!0\)|key\)|streams\.)")
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if makes.search(path.read_text())
    }
    assert not found


def test_the_largest_seed_trains(tmp_path):
    trained = {}
    for seed in (2**31 - 1, 2**32 - 1):
        config = small_config(seed=seed, total_steps=2)
        start = config, tmp_path / str(seed), Regression(), parameters(), frozen()
        trained[seed] = np.asarray(loop.fit(*start, Source())["head"])
        assert np.isfinite(trained[seed]).all()
    assert len({value.tobytes() for value in trained.values()}) == len(trained)


def test_each_seed_has_its_order_of_the_data_and_its_stream_of_shapes():
    orders, captions = set(), set()
    for seed in EDGES:
        first = next(batches(Source(), 16, seed))
        orders.add(np.asarray(first.x).tobytes())
        captions.add(tuple(renderer.sample(seed, index).caption for index in range(8)))
    assert len(orders) == len(captions) == len(EDGES)
