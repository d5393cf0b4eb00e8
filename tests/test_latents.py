"""Pictures through the autoencoder in tiles, in slices, by mean and by sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_autoencoder import _ported, _reference

from jax_distill.models.autoencoder import Autoencoder, AutoencoderConfig, pack, posterior
from jax_distill.models.binding import parameters
from jax_distill.models.latents import LatentCodec
from jax_distill.models.tiling import tiled

CONFIG = AutoencoderConfig(3, 4, (8, 16), 1, 4, 0.5, -0.25)
TILE = 16  # pixels; 8 latent positions
SIZE = (14, 9)  # of latents: last tiles are cut, and no larger than what they share


@pytest.fixture(scope="module", autouse=True)
def quick():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pair():
    """diffusers' autoencoder with tiling, and ours."""
    theirs = _reference(CONFIG)
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = TILE, TILE // CONFIG.downsampling
    return theirs, _ported(CONFIG, theirs)


@pytest.fixture(scope="module")
def codec(pair):
    return LatentCodec(CONFIG, parameters(pair[1]))


def channels_first(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def error(ours, theirs):
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def test_tiles_are_those_of_diffusers(pair):
    theirs, ours = pair
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, *SIZE, 4)).astype(np.float32)
    pictures = rng.uniform(-1, 1, (1, 2 * SIZE[0], 2 * SIZE[1], 3)).astype(np.float32)
    decoded = tiled(jax.jit(ours.decoder), latents, TILE // 2, TILE)
    assert error(decoded, theirs.decode(channels_first(latents)).sample) <= 1e-5
    encoded = posterior(tiled(jax.jit(ours.encoder), pictures, TILE, TILE // 2))
    expected = theirs.encode(channels_first(pictures)).latent_dist
    assert error(encoded.mean, expected.mean) <= 1e-5
    assert error(encoded.logvar, expected.logvar) <= 1e-5
    theirs.disable_tiling()  # it is another function than the whole autoencoder
    assert error(decoded, theirs.decode(channels_first(latents)).sample) > 1e-3
    theirs.enable_tiling()


def test_what_fits_into_one_tile_is_not_tiled(codec):
    images = np.random.default_rng(1).integers(0, 256, (2, 16, 12, 3), np.uint8)
    tokens = codec.encode(images)
    np.testing.assert_array_equal(codec.encode(images, tile=TILE), tokens)
    whole = codec.decode(tokens, 16, 12)
    np.testing.assert_array_equal(codec.decode(tokens, 16, 12, tile=TILE), whole)
    smaller = codec.decode(tokens, 16, 12, tile=8)
    assert smaller.shape == whole.shape and np.abs(smaller.astype(int) - whole).max() > 1


def test_a_constant_is_the_same_in_tiles():
    """The weights of neighbours add up to one everywhere."""
    x = np.ones((1, 37, 50, 2), np.float32)
    np.testing.assert_allclose(tiled(lambda x: 3 * x, x, 16, 16), 3 * x, rtol=1e-6)


def test_slices_change_nothing(pair, codec):
    sliced = LatentCodec(CONFIG, parameters(pair[1]), sliced=True)
    images = np.random.default_rng(2).integers(0, 256, (3, 16, 12, 3), np.uint8)
    tokens = codec.encode(images)
    np.testing.assert_allclose(sliced.encode(images), tokens, atol=1e-5)
    decoded = sliced.decode(tokens, 16, 12).astype(int)
    assert np.abs(decoded - codec.decode(tokens, 16, 12)).max() <= 1


def test_a_sample_is_drawn_from_the_posterior(pair, codec):
    _, ours = pair
    images = np.random.default_rng(3).integers(0, 256, (1, 16, 12, 3), np.uint8)
    key = jax.random.key(0)
    found = Autoencoder.encode(ours, jnp.asarray(images, jnp.float32) / 127.5 - 1)
    noise = jax.random.normal(key, found.mean.shape)
    expected = found.mean + jnp.exp(found.logvar / 2) * noise
    np.testing.assert_allclose(
        codec.encode(images, key=key), pack(ours.normalize(expected)), atol=1e-4
    )
    np.testing.assert_allclose(codec.encode(images), pack(ours.normalize(found.mean)), atol=1e-4)


def test_what_does_not_divide_is_refused(codec):
    images = np.zeros((1, 16, 12, 3), np.uint8)
    with pytest.raises(ValueError, match="tile: 12 is no positive multiple of 8 pixels"):
        codec.encode(images, tile=12)
    with pytest.raises(ValueError, match="tile: 6 is no positive multiple of 4"):
        tiled(lambda x: x, np.zeros((1, 16, 16, 1)), 6, 6)
    with pytest.raises(ValueError, match=r"\(16, 11\) are not multiples of 2"):
        codec.encode(images[:, :, :11])
