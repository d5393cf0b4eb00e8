"""The text model of CLIP in Flax NNX: FLUX's pooled text feature.

A causal, pre-norm transformer with learned positions; the feature of a caption is the last layer's
at the token that ends it. On the same weights the numbers are those of transformers'
`CLIPTextModel`.

Source: Radford et al., arXiv:2103.00020 (CLIP), section 2.4.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_distill.models.binding import binder, parameters
from jax_distill.models.layers import Layers, attend, placed, scan, split_heads
from jax_distill.models.sizes import MOST_WORDS, check_positive, check_size, check_sizes
from jax_distill.ops.placement import constrain
from jax_distill.storage.quoting import shown

# An eos_token_id of 2 is not the end token's id but the mark of configs that transformers wrote
# wrongly until 2023 (FLUX's among them); theirs is the highest id of the vocabulary.
LEGACY_EOS = 2

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x) (Hendrycks & Gimpel, arXiv:1606.08415)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
}

# Fields that old configs lack.
_DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407}


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of the text model under transformers' names; the defaults are CLIP-L's (FLUX).

    Attributes:
      vocab_size: rows of the token table.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_hidden_layers: blocks.
      num_attention_heads: heads of a block; divides `hidden_size`.
      max_position_embeddings: rows of the position table, the longest sequence.
      hidden_act: of the MLP, one of `ACTIVATIONS`.
      layer_norm_eps: of every norm.
      eos_token_id: whose first place is pooled; 2 stands for the highest id of a sequence.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = LEGACY_EOS

    def __post_init__(self) -> None:
        check_size("eos_token_id", self.eos_token_id, least=0, most=MOST_WORDS)
        check_sizes(self, _SIZES)
        check_positive(self, ("layer_norm_eps",))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} does not divide"
                f" hidden_size={self.hidden_size}"
            )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act: {shown(self.hidden_act)} is not one of {', '.join(ACTIVATIONS)}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ClipConfig":
        """Reads the config.json of transformers' `CLIPTextModel`.

        Args:
          values: transformers' keys; those that do not change the function are ignored.

        Raises:
          ValueError: a size is missing or wrong, or the config is of another model.
        """
        values = _DEFAULTS | values
        names = [field.name for field in dataclasses.fields(cls)]
        for name in ["model_type", *names]:
            if name not in values:
                raise ValueError(f"CLIP config: {name!r} is missing.")
        if values["model_type"] != "clip_text_model":
            raise ValueError(
                f"CLIP config: model_type={shown(values['model_type'])} is not supported; only"
                " 'clip_text_model' is."
            )
        return cls(**{name: values[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers' `CLIPTextModel.from_pretrained` reads (JSON-able)."""
        fixed = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
        return fixed | dataclasses.asdict(self)


class ClipFeatures(NamedTuple):
    """Features of captions, wide.

    Attributes:
      sequence: (B, L, hidden_size), after the final norm.
      pooled: (B, hidden_size), the sequence at the end-of-text token, not projected.
    """

    sequence: jax.Array
    pooled: jax.Array


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), x wide."""

    def __init__(self, config: ClipConfig, layers: Layers):
        width = config.hidden_size
        self.num_heads, self.dtype = config.num_attention_heads, layers.dtype
        self.activation = ACTIVATIONS[config.hidden_act]
        self.attention_norm = layers.layer_norm(width, config.layer_norm_eps)
        self.query = layers.linear(width, width, bias=True)
        self.key = layers.linear(width, width, bias=True)
        self.value = layers.linear(width, width, bias=True)
        self.attention_out = layers.linear(width, width, bias=True)
        self.mlp_norm = layers.layer_norm(width, config.layer_norm_eps)
        self.mlp_in = layers.linear(width, config.intermediate_size, bias=True)
        self.mlp_out = layers.linear(config.intermediate_size, width, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        normalised = self.attention_norm(x)
        projections = (self.query, self.key, self.value)
        heads = (split_heads(f(normalised), self.num_heads, self.dtype) for f in projections)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        scale = (x.shape[2] // self.num_heads) ** -0.5
        x = placed(x + self.attention_out(attend(*heads, scale=scale, mask=causal)))
        hidden = constrain(self.activation(self.mlp_in(self.mlp_norm(x))), "batch", None, "heads")
        return placed(x + self.mlp_out(hidden))


class ClipText(nnx.Module):
    """Token ids to a sequence and a pooled feature; blocks are stacked and scanned."""

    def __init__(
        self,
        config: ClipConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        layers = Layers(rngs, dtype, param_dtype)
        self.config, self.wide = config, layers.wide
        self.token_embedding = layers.table(config.vocab_size, config.hidden_size)
        self.position_embedding = layers.table(config.max_position_embeddings, config.hidden_size)
        self.blocks = layers.stack(lambda made: Block(config, made), config.num_hidden_layers)
        self.norm_out = layers.layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, ids: jax.Array) -> ClipFeatures:
        """Encodes token ids.

        Args:
          ids: (B, L) integers below `vocab_size`; larger ones give NaN.

        Returns:
          The sequence, and its entry at the end of the text: at the highest id if
          `eos_token_id` is 2 (see `LEGACY_EOS`), else at the first
          `eos_token_id`; at the first token where there is none.

        Raises:
          ValueError: L is more than `max_position_embeddings`.
        """
        length, limit = ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"ids: {length} tokens are more than max_position_embeddings={limit}; truncate them"
            )
        x = jnp.take(self.token_embedding[...], ids, axis=0).astype(self.wide)
        x = placed(x + self.position_embedding[:length].astype(self.wide))
        sequence = self.norm_out(scan(self.blocks, x))
        eos = self.config.eos_token_id
        end = jnp.argmax(ids if eos == LEGACY_EOS else ids == eos, axis=-1)
        return ClipFeatures(sequence, sequence[jnp.arange(len(ids)), end])


def as_encoder(config: ClipConfig, *, dtype: Any = jnp.float32) -> Callable[..., ClipFeatures]:
    """The text model as a pure function of a parameter tree (`initial_parameters` makes one).

    Args:
      config: sizes of the model.
      dtype: type of the matrix multiplications; parameters keep their own.

    Returns:
      `encode(params, ids)`, as `ClipText.__call__`.
    """
    bind = binder(lambda: ClipText(config, rngs=nnx.Rngs(0), dtype=dtype))

    def encode(params: dict, ids: jax.Array) -> ClipFeatures:
        return bind(params)(ids)

    return encode


def initial_parameters(config: ClipConfig, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> dict:
    """Freshly initialised parameters as a nested dict of arrays."""
    return parameters(ClipText(config, rngs=rngs, param_dtype=param_dtype))
