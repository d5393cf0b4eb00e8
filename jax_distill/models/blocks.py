"""The blocks of FLUX's transformer, and the layers that they are made of."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_distill.models import lora
from jax_distill.models.mmdit_config import MMDiTConfig
from jax_distill.ops.attention.attention import attention
from jax_distill.ops.placement import constrain

MLP_RATIO = 4
NORM_EPSILON = 1e-6


def rotate(x: jax.Array, rotary: jax.Array) -> jax.Array:
    """Rotates each pair of neighbouring channels by its token's angle. x: (B, N, H, D)."""
    compute = jnp.promote_types(x.dtype, jnp.float32)
    cosine, sine = rotary[:, :, None, :].astype(compute)
    # The other channel of each pair. A reshape to pairs would make an axis of two, which is padded
    # to a whole register.
    first = np.arange(x.shape[-1]) % 2 == 0
    other = jnp.where(first, jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
    return (x.astype(compute) * cosine + other.astype(compute) * sine).astype(x.dtype)


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalises the last axis without learned parameters, in float32 or better."""
    compute = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = compute - compute.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + NORM_EPSILON)).astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """adaLN: normalises x (B, N, C), then scales and shifts by each sample's (B, C)."""
    return placed(layer_norm(x) * (1 + scale[:, None]) + shift[:, None])


def placed(x: jax.Array) -> jax.Array:
    """Places tokens (B, N, C) on the mesh, wherever a projection's output or gradient is summed.

    Both the input of projections whose outputs are split over `tensor` (its gradient is such a sum)
    and the output of those whose inputs are split: a sum that is multiplied with a gate before it
    is placed is left out by XLA's partitioner where few tokens lie on a device of some meshes, such
    as 2 x 2 x 2 (github.com/openxla/xla/issues/40034).
    """
    return constrain(x, "batch", "tokens", None)


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes the network's layers: the one place for types and initialisation."""

    rngs: nnx.Rngs
    dtype: Any
    param_dtype: Any
    precision: Any = None  # of products; by default TPUs and GPUs round float32 operands

    @property
    def wide(self) -> "Layers":
        """The same layers computed in float32 or better, every product included."""
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        return dataclasses.replace(self, dtype=dtype, precision=jax.lax.Precision.HIGHEST)

    def linear(self, inputs: int, outputs: int, *, zero: bool = False) -> nnx.Linear:
        return nnx.Linear(
            inputs,
            outputs,
            kernel_init=nnx.initializers.zeros if zero else nnx.initializers.xavier_uniform(),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            dot_general=lora.dot_general,
            promote_dtype=lora.promote_dtype,
            rngs=self.rngs,
        )

    def rms_norm(self, features: int) -> nnx.RMSNorm:
        return nnx.RMSNorm(
            features,
            epsilon=NORM_EPSILON,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )


class Embedder(nnx.Module):
    """Two dense layers with a SiLU between, for time, guidance, interval and pooled text.

    Computes in float32 or better whatever the network's type: embedders add up many features that
    nearly cancel, and bfloat16 would round away much of the difference between two times.
    """

    def __init__(self, inputs: int, hidden: int, layers: Layers, *, zero: bool = False):
        layers = layers.wide
        self.linear_1 = layers.linear(inputs, hidden)
        self.linear_2 = layers.linear(hidden, hidden, zero=zero)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class Heads(nnx.Module):
    """Query, key and value projections of one stream, with RMS norm on queries and keys."""

    def __init__(self, config: MMDiTConfig, layers: Layers):
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = layers.linear(width, width)
        self.key = layers.linear(width, width)
        self.value = layers.linear(width, width)
        self.query_norm = layers.rms_norm(config.attention_head_dim)
        self.key_norm = layers.rms_norm(config.attention_head_dim)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def split(y):
            heads = y.reshape(*y.shape[:-1], self.num_heads, -1)
            return constrain(heads, "batch", None, "heads", None)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        return self.query_norm(query), self.key_norm(key), value


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rotary: jax.Array,
    implementation: str = "auto",
) -> jax.Array:
    """Attention with rotary positions, heads merged: (B, N, H, D) -> (B, N, H D)."""
    query, key = rotate(query, rotary), rotate(key, rotary)
    out = attention(query, key, value, implementation=implementation)
    out = constrain(out, "batch", None, "heads", None)
    return out.reshape(*out.shape[:2], -1)


class Stream(nnx.Module):
    """One modality's weights in a double-stream block."""

    def __init__(self, config: MMDiTConfig, layers: Layers):
        width = config.hidden_size
        self.modulation = layers.linear(width, 6 * width, zero=True)
        self.heads = Heads(config, layers)
        self.attention_out = layers.linear(width, width)
        self.mlp_in = layers.linear(width, MLP_RATIO * width)
        self.mlp_out = layers.linear(MLP_RATIO * width, width)

    def finish(self, x: jax.Array, attended: jax.Array, modulation: list[jax.Array]) -> jax.Array:
        """Adds the attention's output, then the MLP's. x, attended: (B, N, C)."""
        _, _, gate_attention, shift, scale, gate_mlp = modulation
        x = placed(x + gate_attention[:, None] * placed(self.attention_out(attended)))
        hidden = gelu(self.mlp_in(modulate(x, shift, scale)))
        hidden = constrain(hidden, "batch", None, "heads")
        return placed(x + gate_mlp[:, None] * placed(self.mlp_out(hidden)))


class DoubleBlock(nnx.Module):
    """Text and image streams with separate weights and one joint attention."""

    def __init__(self, config: MMDiTConfig, layers: Layers):
        self.attention = config.attention
        self.image = Stream(config, layers)
        self.text = Stream(config, layers)

    def __call__(
        self, image: jax.Array, text: jax.Array, embedding: jax.Array, rotary: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        active = nnx.silu(embedding)
        text_modulation = jnp.split(self.text.modulation(active), 6, axis=-1)
        image_modulation = jnp.split(self.image.modulation(active), 6, axis=-1)
        text_heads = self.text.heads(modulate(text, *text_modulation[:2]))
        image_heads = self.image.heads(modulate(image, *image_modulation[:2]))
        joint = [jnp.concatenate(pair, axis=1) for pair in zip(text_heads, image_heads)]
        attended = attend(*joint, rotary, self.attention)
        tokens = text.shape[1]
        image = self.image.finish(image, attended[:, tokens:], image_modulation)
        text = self.text.finish(text, attended[:, :tokens], text_modulation)
        return image, text


def side_by_side(linear: nnx.Linear, *parts: jax.Array) -> jax.Array:
    """A layer's output for inputs in parts (.., C_i), without concatenating them."""
    first, kernel, bias = linear.promote_dtype(
        (parts[0], linear.kernel[...], linear.bias[...]), dtype=linear.dtype
    )
    parts = [part.astype(first.dtype) for part in parts]
    return lora.dot_side_by_side(parts, kernel, precision=linear.precision) + bias


class SingleBlock(nnx.Module):
    """Both modalities in one sequence; attention and MLP in parallel, one output projection."""

    def __init__(self, config: MMDiTConfig, layers: Layers):
        width = config.hidden_size
        self.attention = config.attention
        self.modulation = layers.linear(width, 3 * width, zero=True)
        self.heads = Heads(config, layers)
        self.mlp_in = layers.linear(width, MLP_RATIO * width)
        self.out = layers.linear((1 + MLP_RATIO) * width, width)

    def __call__(self, x: jax.Array, embedding: jax.Array, rotary: jax.Array) -> jax.Array:
        shift, scale, gate = jnp.split(self.modulation(nnx.silu(embedding)), 3, axis=-1)
        normalised = modulate(x, shift, scale)
        attended = attend(*self.heads(normalised), rotary, self.attention)
        hidden = constrain(gelu(self.mlp_in(normalised)), "batch", None, "heads")
        return placed(x + gate[:, None] * placed(side_by_side(self.out, attended, hidden)))
