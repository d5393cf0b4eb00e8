"""Pictures to the transformer's tokens and back, through an autoencoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_distill.models.autoencoder import Autoencoder, AutoencoderConfig, pack, unpack
from jax_distill.models.binding import binder


class LatentCodec:
    """An autoencoder with its parameters, from uint8 pictures to packed tokens and back.

    Args:
      config: of the autoencoder.
      params: its parameters.
    """

    def __init__(self, config: AutoencoderConfig, params: dict):
        self.config, self._params = config, params
        self._bind = binder(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))

    def encode(self, images: np.ndarray) -> jax.Array:
        """(B, H, W, 3) uint8 to normalised, packed posterior means (B, N, 4c)."""
        return self._encode(self._params, jnp.asarray(images))

    def decode(self, tokens: jax.Array, height: int, width: int) -> np.ndarray:
        """Tokens (B, N, 4c) to pictures (B, height, width, 3) uint8."""
        return np.asarray(self._decode(self._params, tokens, height, width))

    @functools.partial(jax.jit, static_argnums=0)
    def _encode(self, params, images):
        model = self._bind(params)
        mean = model.encode(images.astype(jnp.float32) / 127.5 - 1).mean
        return pack(model.normalize(mean))

    @functools.partial(jax.jit, static_argnums=(0, 3, 4))
    def _decode(self, params, tokens, height, width):
        model, factor = self._bind(params), self.config.downsampling
        latents = model.denormalize(unpack(tokens, height // factor, width // factor))
        pictures = (model.decode(latents) + 1) * 127.5
        return jnp.round(jnp.clip(pictures, 0, 255)).astype(jnp.uint8)
