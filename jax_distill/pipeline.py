"""Text to pictures with a trained network: what `jax_distill.load` returns."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_distill import build, checkpoint, embedded
from jax_distill import config as configuration
from jax_distill.flow import Text
from jax_distill.models.latents import LatentCodec
from jax_distill.objectives.objective import Objective

EMBEDDED = "embedded"  # in the place of a workdir: the teacher that ships with the package


class Pipeline:
    """A network, its sampler, the caption encoder and the autoencoder.

    Args:
      config: of the run that trained the network.
      params: what its objective trained (averaged), {"network": ...}.
      codec: turns tokens into pictures.
    """

    def __init__(self, config: ConfigDict, params: dict, codec: LatentCodec):
        self.config, self.params, self.codec = config, params, codec
        self.objective: Objective = build.objective(config)
        self.encoder = build.caption_encoder(config)
        self.null = build.null_text(config)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int = 2,
        seed: int = 0,
        guidance: float | None = None,
        batch_size: int = 60,
    ) -> np.ndarray:
        """Draws one picture a prompt.

        Args:
          prompts: one caption or several.
          steps: of the sampler; 1, 2 or 4 for a student, 50 for a teacher.
          seed: of the noise. The i-th picture depends on (prompt, seed, i) alone.
          guidance: scale; the configuration's by default.
          batch_size: pictures drawn at a time.

        Returns:
          (B, H, W, 3) uint8.

        Raises:
          ValueError: a caption is longer than the encoder takes, or steps is not positive.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if steps < 1:
            raise ValueError(f"steps: {steps} is not at least 1")
        if not prompts:
            raise ValueError("prompts: none given; pass one caption or more")
        text = Text(*self.encoder.encode(prompts))
        scale = self.config.evaluation.guidance if guidance is None else guidance
        size = min(batch_size, len(prompts))
        pictures = []
        for start in range(0, len(prompts), size):
            # The last batch is filled up, so that one shape compiles.
            rows = np.minimum(np.arange(start, start + size), len(prompts) - 1)
            part = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf[rows]), text)
            tokens = self._draw(self.params, part, jnp.asarray(rows), scale, seed, steps)
            pictures.append(self.codec.decode(tokens, *build.picture_size(self.config)))
        return np.concatenate(pictures)[: len(prompts)]

    @functools.partial(jax.jit, static_argnums=(0, 6))
    def _draw(self, params, text, rows, scale, seed, steps):
        def one_row(row):
            key_noise, key_restart = jax.random.split(jax.random.fold_in(jax.random.key(seed), row))
            return jax.random.normal(key_noise, build.token_shape(self.config)), key_restart

        noise, keys = jax.vmap(one_row)(rows)
        guidance = jnp.full(rows.shape, scale, jnp.float32)
        return self.objective.sample(params, noise, text, self.null, guidance, keys, steps)


def load(source: str | Path = EMBEDDED) -> Pipeline:
    """The pipeline of a training run, or of the teacher that ships with the package.

    Args:
      source: a workdir of `jax_distill.main`, or "embedded".

    Raises:
      ValueError: there is no such run, or it has no checkpoint yet.
    """
    if str(source) == EMBEDDED:
        params, description = embedded.load("teacher")
        config = ConfigDict(description["config"]).lock()
        return Pipeline(config, {"network": params}, build.embedded_codec())
    workdir = Path(source)
    config = configuration.load(workdir)
    return Pipeline(config, checkpoint.load_averaged(workdir), build.embedded_codec())
