"""Embeds captions as FLUX's conditioning: T5's sequence and CLIP's pooled feature."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_distill.flow import Text
from jax_distill.models import clip, t5

BATCH = 8  # captions at a time


class Part(NamedTuple):
    """A network's configuration and its parameters."""

    config: Any
    params: dict


class TextEncoders:
    """FLUX's two text encoders with their tokenizers.

    Args:
      tokenize: captions (B,) to arrays `(clip, t5)` of token ids, (B, 77) and (B, L); see
        `FluxTokenizer.encode`.
      clip_part: a `ClipConfig` and parameters.
      t5_part: a `T5Config` and parameters.
      dtype: type of the matrix multiplications; parameters keep their own.
      mesh: of the parameters, if they lie on one: each of its processes gets all features.
    """

    def __init__(
        self,
        tokenize: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]],
        clip_part: Part,
        t5_part: Part,
        *,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ):
        self._tokenize, self._params = tokenize, (clip_part.params, t5_part.params)
        pooled = clip.as_encoder(clip_part.config, dtype=dtype)
        sequence = t5.as_encoder(t5_part.config, dtype=dtype)

        def encode(params, clip_ids, t5_ids):
            return Text(sequence(params[1], t5_ids), pooled(params[0], clip_ids).pooled)

        whole = NamedSharding(mesh, PartitionSpec()) if mesh is not None else None
        self._encode = jax.jit(encode, out_shardings=whole)

    def encode(self, captions: Sequence[str]) -> Text:
        """Embeds captions; one that is too long is cut off, with a warning.

        Returns:
          Sequence (B, L, D) and pooled (B, P) in host memory, float32.

        Raises:
          ValueError: there are no captions.

        Source: diffusers' `FluxPipeline.encode_prompt`; padding is encoded and attended to.
        """
        ids = self._tokenize(captions)
        parts = []
        size = min(BATCH, len(captions))
        for start in range(0, len(captions), size):
            # The last batch is filled up, so that one shape compiles.
            rows = np.minimum(np.arange(start, start + size), len(captions) - 1)
            part = self._encode(self._params, *(array[rows] for array in ids))
            parts.append(jax.tree.map(np.asarray, part))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(captions)], *parts)
