"""Pictures to the transformer's tokens and back, through an autoencoder."""

import copy
import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from jax_distill.models import finite
from jax_distill.models.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    pack,
    posterior,
    sample_posterior,
    unpack,
)
from jax_distill.models.binding import bound
from jax_distill.models.tiling import tiled


class LatentCodec:
    """An autoencoder with its parameters, from uint8 pictures to packed tokens and back.

    Parameters keep their type; the computation is in float32.

    Args:
      config: of the autoencoder.
      params: its parameters.
      sliced: whether pictures go through it one by one, so that memory does not grow with the
        batch; the numbers are the same.
    """

    def __init__(self, config: AutoencoderConfig, params: dict, *, sliced: bool = False):
        self.config, self._params = config, params
        self._model = nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
        bind = bound(self._model)

        def through(apply, params, x):
            if not sliced:
                return apply(bind(params), x)
            return jax.lax.map(lambda one: apply(bind(params), one[None])[0], x)

        self._moments = jax.jit(functools.partial(through, lambda model, x: model.encoder(x)))
        self._pictures = jax.jit(functools.partial(through, lambda model, z: model.decoder(z)))

    def encode(
        self, images: np.ndarray, *, key: jax.Array | None = None, tile: int | None = None
    ) -> jax.Array:
        """Pictures to normalised, packed latents (B, N, 4c).

        Args:
          images: (B, H, W, 3) uint8, H and W multiples of twice the autoencoder's downsampling.
          key: draws from the posterior; without one, its mean is taken.
          tile: pixels along a side that are encoded at a time, see `models.tiling`; all by default.

        Raises:
          ValueError: H, W or the tile is no such multiple.
        """
        images = np.asarray(images, np.float32) / 127.5 - 1
        self._model.check_size(images)
        found = posterior(self._in_tiles(self._moments, images, tile, encode=True))
        latents = found.mean if key is None else sample_posterior(found, key)
        return pack(self._model.normalize(latents))

    def decode(
        self,
        tokens: jax.Array,
        height: int,
        width: int,
        *,
        tile: int | None = None,
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Tokens to pictures (B, height, width, 3) uint8.

        Args:
          tokens: (B, N, 4c).
          height: of the pictures in pixels.
          width: likewise.
          tile: as in `encode`.
          names: of the pictures, for messages; at least B.

        Raises:
          NotFinite: a picture is not: it would be rounded to black or white.
        """
        factor = self.config.downsampling
        latents = unpack(np.asarray(tokens), height // factor, width // factor)
        latents = self._model.denormalize(latents)
        pictures = self._in_tiles(self._pictures, latents, tile, encode=False)
        if finite.bad_rows(pictures):
            names = names or finite.name_pictures(len(pictures))
            cause = "the latents are too large for the autoencoder"
            if bad := finite.first_bad_array(self._params):
                cause = f"the autoencoder's weights are not, in '{bad}'"
            finite.check_rows(pictures, names, "decoded, its pixels are", f"{cause}; load others")
        return np.round(np.clip((pictures + 1) * 127.5, 0, 255)).astype(np.uint8)

    def token_shape(self, height: int, width: int) -> tuple[int, int]:
        """Tokens and channels, (N, 4c), of a picture of so many pixels."""
        size = 2 * self.config.downsampling
        return (height // size) * (width // size), 4 * self.config.latent_channels

    def on(self, device: jax.Device) -> "LatentCodec":
        """The same with parameters on another device, where it then computes."""
        moved = copy.copy(self)
        moved._params = jax.device_put(self._params, device)
        return moved

    def forget(self) -> None:
        """Lets go of what is compiled for the sizes that were used."""
        self._moments.clear_cache()
        self._pictures.clear_cache()

    def check_tile(self, tile: int | None) -> None:
        """Raises ValueError for a size of tiles that `encode` and `decode` do not take."""
        unit = 4 * self.config.downsampling
        if tile is not None and (tile < 1 or tile % unit):
            raise ValueError(f"tile: {tile} is no positive multiple of {unit} pixels")

    def _in_tiles(self, apply, x, tile, *, encode):
        apply = functools.partial(apply, self._params)
        if tile is None:
            return np.asarray(apply(x))
        self.check_tile(tile)
        small = tile // self.config.downsampling
        return tiled(apply, x, tile, small) if encode else tiled(apply, x, small, tile)
