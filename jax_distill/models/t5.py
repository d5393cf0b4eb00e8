"""The encoder of T5 version 1.1 in Flax NNX: FLUX's sequence of text features.

Pre-norm blocks of attention and a gated MLP, without biases; positions enter as a bias on the
attention scores alone, and those are not scaled. On the same weights the numbers are those of
transformers' `T5EncoderModel`.

The weights were trained in bfloat16, whose range is float32's: activations outgrow float16, and
small contributions to a large residual are lost in a short mantissa. So the residual stream, the
norms, the scores and softmax, the gated product and the projection after it are wide in any type of
computation (see `layers`).

Source: Raffel et al., arXiv:1910.10683 (T5); Shazeer, arXiv:2002.05202 (gated GELU, version 1.1);
Zhang & Sennrich, arXiv:1910.07467 (RMS norm).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_distill.models.binding import binder, parameters
from jax_distill.models.layers import Layers, attend, placed, scan, split_heads
from jax_distill.models.sizes import check_positive, check_sizes
from jax_distill.ops.placement import constrain
from jax_distill.storage.quoting import shown

_SIZES = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)

# Other keys of transformers' config, and the only value that this network supports.
_FIXED = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
# Fields that old configs lack.
_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder under transformers' names; the defaults are T5-v1.1-XXL's (FLUX).

    Attributes:
      vocab_size: rows of the embedding table.
      d_model: width of the residual stream.
      d_kv: width of a head; `num_heads * d_kv` need not be `d_model`.
      d_ff: width of the gated MLP.
      num_layers: blocks.
      num_heads: heads of a block.
      relative_attention_num_buckets: distances that are told apart, both directions together.
      relative_attention_max_distance: from here on all distances share the last bucket.
      layer_norm_epsilon: of every norm.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_sizes(self, _SIZES)
        check_positive(self, ("layer_norm_epsilon",))
        buckets = self.relative_attention_num_buckets
        if buckets < 4 or buckets % 2:
            raise ValueError(
                f"relative_attention_num_buckets: {buckets} is not an even number of at least 4;"
                " half of the buckets are for each direction"
            )
        if self.relative_attention_max_distance <= buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance: {self.relative_attention_max_distance} must be"
                f" more than {buckets // 4}, the distances that have a bucket of their own"
                f" (relative_attention_num_buckets={buckets})"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "T5Config":
        """Reads the config.json of transformers' `T5EncoderModel`.

        Args:
          values: transformers' keys; those that do not change the function are ignored.

        Raises:
          ValueError: a size is missing or wrong, or the config asks for something this network
            does not support (version 1.0 of T5, another activation).
        """
        values = _DEFAULTS | values
        names = [field.name for field in dataclasses.fields(cls)]
        for name in [*names, *_FIXED]:
            if name not in values:
                raise ValueError(f"T5 config: {name!r} is missing.")
        for name, expected in _FIXED.items():
            if values[name] != expected:
                raise ValueError(
                    f"T5 config: {name}={shown(values[name])} is not supported; only {expected!r}"
                    " is."
                )
        return cls(**{name: values[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers' `T5EncoderModel.from_pretrained` reads (JSON-able)."""
        fixed = {"architectures": ["T5EncoderModel"], "is_encoder_decoder": False} | _FIXED
        # As version 1.1 has it; its encoder ignores both.
        return fixed | {"tie_word_embeddings": False} | dataclasses.asdict(self)


def relative_buckets(config: T5Config, length: int) -> np.ndarray:
    """The bucket of each pair of positions.

    Half of the buckets are for keys before the query, half for keys after it. In each half the
    first half is for single distances and the rest for logarithmically growing ranges of them.

    Args:
      config: of the encoder.
      length: L, tokens of a sequence.

    Returns:
      (L, L) int32, query by key.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(relative)
    # Rounded to float32 step by step, as transformers does: at a range's edge the last bit decides.
    ratio = (np.maximum(distance, 1) / exact).astype(np.float32)
    logarithm = np.log(ratio.astype(np.float64)).astype(np.float32)
    span = np.float32(math.log(config.relative_attention_max_distance / exact))
    coarse = exact + np.trunc(logarithm / span * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(coarse, half - 1))
    return (bucket + half * (relative > 0)).astype(np.int32)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), x wide."""

    def __init__(self, config: T5Config, layers: Layers):
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.num_heads, self.dtype = config.num_heads, layers.dtype
        self.attention_norm = layers.rms_norm(width, config.layer_norm_epsilon)
        self.query = layers.linear(width, inner, bias=False)
        self.key = layers.linear(width, inner, bias=False)
        self.value = layers.linear(width, inner, bias=False)
        self.attention_out = layers.linear(inner, width, bias=False)
        self.mlp_norm = layers.rms_norm(width, config.layer_norm_epsilon)
        self.mlp_gate = layers.linear(width, config.d_ff, bias=False)
        self.mlp_in = layers.linear(width, config.d_ff, bias=False)
        self.mlp_out = layers.linear(config.d_ff, width, bias=False, dtype=layers.wide)

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        normalised = self.attention_norm(x)
        projections = (self.query, self.key, self.value)
        heads = (split_heads(f(normalised), self.num_heads, self.dtype) for f in projections)
        x = placed(x + self.attention_out(attend(*heads, bias=bias, mask=mask)))
        normalised = self.mlp_norm(x)
        gate = jax.nn.gelu(self.mlp_gate(normalised), approximate=True)
        hidden = constrain(gate * self.mlp_in(normalised), "batch", None, "heads")
        return placed(x + self.mlp_out(hidden))


class T5Encoder(nnx.Module):
    """Token ids to a sequence of features; blocks are stacked and scanned."""

    def __init__(
        self,
        config: T5Config,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        layers = Layers(rngs, dtype, param_dtype)
        self.config, self.wide = config, layers.wide
        self.token_embedding = layers.table(config.vocab_size, config.d_model)
        # The first block's, for all of them: (buckets, heads).
        self.relative_bias = layers.table(config.relative_attention_num_buckets, config.num_heads)
        self.blocks = layers.stack(lambda made: Block(config, made), config.num_layers)
        self.norm_out = layers.rms_norm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Encodes token ids.

        Args:
          ids: (B, L) integers below `vocab_size`; larger ones give NaN.
          mask: (B, L), true (or 1) where a token may be attended to; None, as in FLUX, for all,
            padding too.

        Returns:
          (B, L, d_model), wide.

        Raises:
          ValueError: the mask is not of the shape of the ids.
        """
        if mask is not None:
            if mask.shape != ids.shape:
                raise ValueError(f"mask: shape {mask.shape} is not that of the ids, {ids.shape}")
            mask = mask.astype(bool)[:, None, None, :]
        buckets = relative_buckets(self.config, ids.shape[1])
        bias = self.relative_bias[...].astype(self.wide)[buckets]  # (query, key, heads)
        x = placed(jnp.take(self.token_embedding[...], ids, axis=0).astype(self.wide))
        return self.norm_out(scan(self.blocks, x, bias.transpose(2, 0, 1)[None], mask))


def as_encoder(config: T5Config, *, dtype: Any = jnp.float32) -> Callable[..., jax.Array]:
    """The encoder as a pure function of a parameter tree (`initial_parameters` makes one).

    Args:
      config: sizes of the encoder.
      dtype: type of the matrix multiplications; parameters keep their own.

    Returns:
      `encode(params, ids, mask=None)`, as `T5Encoder.__call__`.
    """
    bind = binder(lambda: T5Encoder(config, rngs=nnx.Rngs(0), dtype=dtype))

    def encode(params: dict, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return bind(params)(ids, mask)

    return encode


def initial_parameters(config: T5Config, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> dict:
    """Freshly initialised parameters as a nested dict of arrays."""
    return parameters(T5Encoder(config, rngs=rngs, param_dtype=param_dtype))
