"""Embeds captions as FLUX's conditioning: T5's sequence and CLIP's pooled feature."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_distill.flow import Text
from jax_distill.models import clip, t5
from jax_distill.worlds.flux.tokenizers import TokenIds

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
        tokenize: Callable[[Sequence[str]], TokenIds],
        clip_part: Part,
        t5_part: Part,
        *,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ):
        self._tokenize = tokenize
        self._params = {"clip": clip_part.params, "t5": t5_part.params}
        encode = encoding(clip_part.config, t5_part.config, dtype)
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
        for rows in portions(len(captions), min(BATCH, len(captions))):
            part = self._encode(self._params, TokenIds(*(array[rows] for array in ids)))
            parts.append(jax.tree.map(np.asarray, part))
        return joined(parts, len(captions))


def encoding(
    clip_config: clip.ClipConfig, t5_config: t5.T5Config, dtype: Any
) -> Callable[[dict, TokenIds], Text]:
    """Both encoders as a function of ({"clip": .., "t5": ..}, token ids (B, ..)), wide."""
    pooled = clip.as_encoder(clip_config, dtype=dtype)
    sequence = t5.as_encoder(t5_config, dtype=dtype)

    def encode(params: dict, ids: TokenIds) -> Text:
        return Text(sequence(params["t5"], ids.t5), pooled(params["clip"], ids.clip).pooled)

    return encode


def shapes(config: clip.ClipConfig | t5.T5Config) -> dict:
    """Shapes of an encoder's parameters, nested, float32."""
    module = clip if isinstance(config, clip.ClipConfig) else t5
    return jax.eval_shape(lambda: module.initial_parameters(config, nnx.Rngs(0)))


def portions(count: int, size: int) -> list[np.ndarray]:
    """The rows of portions of one size, which compile as one; the last row fills up the last."""
    starts = range(0, count, size)
    return [np.minimum(np.arange(start, start + size), count - 1) for start in starts]


def joined(parts: Sequence[Text], count: int) -> Text:
    """The first so many rows of embedded portions."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
