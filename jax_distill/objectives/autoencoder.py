"""The autoencoder's objective: reconstruction with a KL term that smooths the latents.

Not a flow map: the one objective whose samples are pictures and whose product is a latent space.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Batch
from jax_distill.objectives.objective import Method, View
from jax_distill.objectives.settings import not_negative


class AutoencoderDraws(NamedTuple):
    noise: jax.Array  # (B, h, w, c), standard normal: the posterior's sample


@dataclasses.dataclass(frozen=True)
class AutoencoderObjective(Method):
    """Negative evidence bound of a Gaussian autoencoder, per pixel.

    `mean (x - decode(z))^2 + l1_weight mean |x - decode(z)| + kl_weight mean KL(q(z|x) | N(0, 1))`,
    z = mean + exp(logvar / 2) noise. The heavier the KL term, the smoother the latents and the
    easier they are to model; the reconstructions say how far one may go.

    Source: Kingma & Welling, arXiv:1312.6114; Rombach et al., arXiv:2112.10752, section 3.1.

    Attributes:
      encode: (params, pictures (B, H, W, 3) in [-1, 1]) -> (mean, logvar), (B, h, w, c) each.
      decode: (params, latents (B, h, w, c)) -> pictures.
      latent_shape: (h, w, c).
      kl_weight: weight of the mean KL term.
      l1_weight: weight of the mean absolute error.
    """

    name = "autoencoder"
    from_scratch = True

    encode: Callable
    decode: Callable
    latent_shape: tuple[int, int, int]
    kl_weight: float = not_negative(1e-3)
    l1_weight: float = not_negative(0.1)

    def init_student(self, key: jax.Array, params: dict) -> dict:
        del key
        return params

    def draw(self, key: jax.Array, batch: Batch) -> AutoencoderDraws:
        shape = (batch.x.shape[0], *self.latent_shape)
        return AutoencoderDraws(jax.random.normal(key, shape))

    def loss(
        self, params: dict, view: View, batch: Batch, draws: AutoencoderDraws, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del view, step
        mean, logvar = self.encode(params, batch.x)
        latents = mean + jnp.exp(0.5 * logvar) * draws.noise
        error = self.decode(params, latents) - batch.x
        square, absolute = jnp.mean(jnp.square(error)), jnp.mean(jnp.abs(error))
        divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
        loss = square + self.l1_weight * absolute + self.kl_weight * divergence
        return loss, {"square_error": square, "absolute_error": absolute, "kl": divergence}
