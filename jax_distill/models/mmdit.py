"""FLUX's multimodal diffusion transformer (MMDiT) in Flax NNX.

Double-stream blocks keep separate weights for text and image tokens and attend jointly;
single-stream blocks run both through the same weights, attention and MLP in parallel. Every block
is modulated (adaLN-zero) by the sum of the time, guidance and pooled-text embeddings. On the same
weights the numbers are those of diffusers' `FluxTransformer2DModel`.

Source: Esser et al., arXiv:2403.03206 (MMDiT); FLUX.1, Black Forest Labs, 2024 (single-stream
blocks, rotary positions, guidance embedding).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_distill.flow import Network, Text
from jax_distill.models import lora
from jax_distill.models.binding import binder, parameters
from jax_distill.models.sizes import (
    DEEPEST,
    check_flags,
    check_positive,
    check_size,
    check_sizes,
    checked_sequence,
)
from jax_distill.ops.attention.attention import IMPLEMENTATIONS, attention
from jax_distill.ops.placement import constrain

TIME_FREQUENCIES = 256  # channels of the sinusoidal features of time, guidance and interval
MLP_RATIO = 4
NORM_EPSILON = 1e-6

_WIDTHS = (
    "in_channels",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
)

REMAT_POLICIES: Mapping[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Shape of the network; fields that diffusers has too carry its names.

    `time_scale` multiplies t, and the interval t - s, before they are embedded: 1000 for FLUX, 1
    once rescaled (see `objectives/time_rescale.py`) and for T2I-Distill's networks.
    `guidance_factor` does the same to the guidance scale w: 1000 for FLUX, 1 for T2I-Distill's.
    `interval_embeds` adds the second time embedder that MeanFlow and IMM feed with t - s.
    `attention` is an implementation of `ops.attention`.
    """

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 10000.0
    time_scale: float = 1000.0
    guidance_factor: float = 1000.0
    interval_embeds: bool = False
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        axes = checked_sequence("axes_dims_rope", self.axes_dims_rope, longest=3)
        object.__setattr__(self, "axes_dims_rope", axes)
        check_sizes(self, _WIDTHS)
        for name in ("num_layers", "num_single_layers"):
            check_size(name, getattr(self, name), least=0, most=DEEPEST)
        for width in axes:
            check_size("axes_dims_rope", width, least=0)
        check_flags(self, ("guidance_embeds", "interval_embeds"))
        check_positive(self, ("time_scale", "guidance_factor", "rope_theta"))
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope: {self.axes_dims_rope} must add up to attention_head_dim, "
                f"which is {self.attention_head_dim}"
            )
        if any(width % 2 for width in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope: {self.axes_dims_rope} must all be even")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat: {self.remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        if self.attention not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"attention: {self.attention!r} is not one of {known}")

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


def sinusoidal_features(values: jax.Array) -> jax.Array:
    """(B,) -> (B, 256): cosines, then sines, of frequencies 1 to 1/10000, as FLUX orders them.

    In float32 or better, whatever the values are: a rounded time is another time.
    """
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    half = TIME_FREQUENCIES // 2
    # At values of thousands an angle shows the last bit of its frequency: the exponents are rounded
    # to float32 as FLUX's are, and so is their exponential, which numpy's float32 exp misses.
    exponents = -math.log(10000.0) * np.arange(half, dtype=np.float32) / half
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = values[:, None] * frequencies.astype(values.dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotary_table(config: MMDiTConfig, text_tokens: int, grid: tuple[int, int]) -> np.ndarray:
    """Cosine and sine of each token's rotary angles: (2, text + image tokens, head_dim).

    Text tokens sit at (0, 0, 0), the image token of row i and column j at (0, i, j). The two
    channels of a pair have the same angle; its sine has a minus sign for the first of them.
    """
    rows, columns = grid
    image_ids = np.stack([np.zeros(grid), *np.indices(grid)], axis=-1).reshape(rows * columns, 3)
    ids = np.concatenate([np.zeros((text_tokens, 3)), image_ids])
    angles = [
        ids[:, axis, None] / config.rope_theta ** (np.arange(0, width, 2) / width)
        for axis, width in enumerate(config.axes_dims_rope)
    ]
    angles = np.concatenate(angles, axis=-1)
    sine = np.stack([-np.sin(angles), np.sin(angles)], axis=-1).reshape(len(ids), -1)
    return np.stack([np.cos(angles).repeat(2, axis=-1), sine]).astype(np.float32)


def rotate(x: jax.Array, rotary: jax.Array) -> jax.Array:
    """Turns each pair of neighbouring channels by its token's angle. x: (B, N, H, D)."""
    compute = jnp.promote_types(x.dtype, jnp.float32)
    cosine, sine = rotary[:, :, None, :].astype(compute)
    # The other channel of each pair. An axis of the two would be padded to a whole register's.
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
    """adaLN: normalise x (B, N, C), then scale and shift by the sample's (B, C)."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


def placed(x: jax.Array) -> jax.Array:
    """Tokens (B, N, C) between blocks, on the mesh of the training step."""
    return constrain(x, "batch", "tokens", None)


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


@dataclasses.dataclass(frozen=True)
class Layers:
    """How this network makes its dense layers: one place for types and initialisation."""

    rngs: nnx.Rngs
    dtype: Any
    param_dtype: Any
    precision: Any = None  # of products; TPUs and GPUs round float32's operands unless asked not to

    @property
    def wide(self) -> "Layers":
        """The same in float32 or better, every product included."""
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
    """Two dense layers with a SiLU between: time, guidance, interval and pooled text use it.

    It computes in float32 or better whatever the network does: embedders add up many features that
    nearly cancel, and what bfloat16 rounds of each is much of what tells one time from another.
    """

    def __init__(self, inputs: int, hidden: int, layers: Layers, *, zero: bool = False):
        layers = layers.wide
        self.linear_1 = layers.linear(inputs, hidden)
        self.linear_2 = layers.linear(hidden, hidden, zero=zero)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class Heads(nnx.Module):
    """Query, key and value projections of one stream, with RMS norm of queries and keys."""

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
    """Attention over rotated queries and keys; heads merged: (B, N, H, D) -> (B, N, H D)."""
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
        """Residual attention output, then the residual MLP. x, attended: (B, N, C)."""
        _, _, gate_attention, shift, scale, gate_mlp = modulation
        x = placed(x + gate_attention[:, None] * self.attention_out(attended))
        hidden = gelu(self.mlp_in(modulate(x, shift, scale)))
        hidden = constrain(hidden, "batch", None, "heads")
        return placed(x + gate_mlp[:, None] * self.mlp_out(hidden))


class DoubleBlock(nnx.Module):
    """Text and image streams with their own weights and one joint attention."""

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
    """A layer's output for parts (.., C_i) of its inputs, without putting them side by side."""
    first, kernel, bias = linear.promote_dtype(
        (parts[0], linear.kernel[...], linear.bias[...]), dtype=linear.dtype
    )
    parts = [part.astype(first.dtype) for part in parts]
    return lora.dot_side_by_side(parts, kernel, precision=linear.precision) + bias


class SingleBlock(nnx.Module):
    """Both modalities in one sequence; attention and MLP side by side, one output projection."""

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
        return placed(x + gate[:, None] * side_by_side(self.out, attended, hidden))


class MMDiT(nnx.Module):
    """FLUX's transformer: (x_t, t, text, guidance) -> velocity.

    Blocks of a kind are stacked along a leading layer axis and scanned, so that compile time does
    not grow with depth.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        layers = Layers(rngs, dtype, param_dtype)
        width = config.hidden_size
        self.config = config
        self.image_in = layers.linear(config.in_channels, width)
        self.text_in = layers.linear(config.joint_attention_dim, width)
        self.time_embedder = Embedder(TIME_FREQUENCIES, width, layers)
        self.guidance_embedder = (
            Embedder(TIME_FREQUENCIES, width, layers, zero=True) if config.guidance_embeds else None
        )
        self.interval_embedder = (
            Embedder(TIME_FREQUENCIES, width, layers, zero=True) if config.interval_embeds else None
        )
        self.pooled_embedder = Embedder(config.pooled_projection_dim, width, layers)

        def stack(block: Callable, count: int) -> nnx.Module:
            @nnx.split_rngs(splits=count)
            @nnx.vmap
            def create(layer_rngs):
                return block(config, Layers(layer_rngs, dtype, param_dtype))

            return create(rngs)

        self.double_blocks = stack(DoubleBlock, config.num_layers)
        self.single_blocks = stack(SingleBlock, config.num_single_layers)
        self.out_modulation = layers.linear(width, 2 * width, zero=True)
        self.image_out = layers.linear(width, config.in_channels, zero=True)

    def embedding(
        self,
        t: jax.Array,
        pooled: jax.Array,
        guidance: jax.Array | None = None,
        interval: jax.Array | None = None,
    ) -> jax.Array:
        """The summed embedding that modulates every block, float32 or better.

        Args:
          t: (B,) time in [0, 1].
          pooled: (B, P) pooled text embedding.
          guidance: (B,) guidance scale; required if and only if the network embeds it.
          interval: (B,) t - s in [0, 1]; None stands for zero.

        Returns:
          (B, hidden size).

        Raises:
          ValueError: guidance or an interval is given to a network without its embedder, or
            guidance is missing from one that has it.
        """
        if (guidance is not None) != (self.guidance_embedder is not None):
            raise ValueError(
                "guidance: this network embeds a guidance scale, so one must be given"
                if guidance is None
                else "guidance: this network has no guidance embedding (guidance_embeds=False)"
            )
        if interval is not None and self.interval_embedder is None:
            raise ValueError(
                "interval: this network has no second time embedder (interval_embeds=False)"
            )
        total = self.time_embedder(sinusoidal_features(self.config.time_scale * t))
        if guidance is not None:
            factor = self.config.guidance_factor
            total = total + self.guidance_embedder(sinusoidal_features(factor * guidance))
        if self.interval_embedder is not None:
            interval = jnp.zeros_like(t) if interval is None else interval
            total = total + self.interval_embedder(
                sinusoidal_features(self.config.time_scale * interval)
            )
        return total + self.pooled_embedder(pooled)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        text: Text,
        guidance: jax.Array | None = None,
        interval: jax.Array | None = None,
        *,
        grid: tuple[int, int] | None = None,
    ) -> jax.Array:
        """Velocity dx_t/dt.

        Args:
          x: (B, N, C) packed latents, row-major over the grid.
          t: (B,) time in [0, 1].
          text: sequence (B, L, joint_attention_dim) and pooled (B, pooled_projection_dim).
          guidance: (B,) guidance scale for networks that embed it.
          interval: (B,) t - s for networks with a second time embedder.
          grid: rows and columns of tokens; a square one by default.

        Returns:
          (B, N, C).

        Raises:
          ValueError: the grid does not have N tokens, or as `embedding`.
        """
        grid = square_grid(x.shape[1]) if grid is None else grid
        if grid[0] * grid[1] != x.shape[1]:
            raise ValueError(f"grid: {grid} has {grid[0] * grid[1]} tokens, x has {x.shape[1]}")
        embedding = self.embedding(t, text.pooled, guidance, interval)
        rotary = jnp.asarray(rotary_table(self.config, text.sequence.shape[1], grid))
        image, sequence = placed(self.image_in(x)), placed(self.text_in(text.sequence))

        def double(carry, block):
            return block(*carry, embedding, rotary), None

        def single(carry, block):
            return block(carry, embedding, rotary), None

        image, sequence = self._scan(double, (image, sequence), self.double_blocks)
        tokens = self._scan(single, jnp.concatenate([sequence, image], axis=1), self.single_blocks)
        image = tokens[:, sequence.shape[1] :]
        scale, shift = jnp.split(self.out_modulation(nnx.silu(embedding)), 2, axis=-1)
        return self.image_out(modulate(image, shift, scale))

    def _scan(self, body: Callable, carry: Any, blocks: nnx.Module) -> Any:
        """Applies a stack of blocks one layer after another, rematerialised by the policy."""
        graph, stacked = nnx.split(blocks)

        def layer(carry, state):
            return body(carry, nnx.merge(graph, state))

        if self.config.remat != "none":
            layer = jax.checkpoint(
                layer, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False
            )
        return jax.lax.scan(layer, carry, stacked)[0]


def square_grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of a square grid of `tokens`; raises ValueError when it is not square."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"grid: {tokens} tokens are not a square; give the rows and columns")
    return side, side


def as_network(config: MMDiTConfig, *, dtype: Any = jnp.float32, grid=None) -> Network:
    """The network as pure functions of a parameter tree (`initial_parameters` makes one).

    Args:
      config: shape of the network.
      dtype: type of the computation; parameters keep their own.
      grid: rows and columns of image tokens; a square by default.
    """
    bind = binder(lambda: MMDiT(config, rngs=nnx.Rngs(0), dtype=dtype))

    def velocity(params, x, t, text, guidance=None, interval=None):
        output = bind(params)(x, t, text, guidance, interval, grid=grid)
        return output.astype(jnp.promote_types(output.dtype, jnp.float32))

    def embedding(params, t, text, guidance=None):
        output = bind(params).embedding(t, text.pooled, guidance)
        return output.astype(jnp.promote_types(output.dtype, jnp.float32))

    return Network(velocity, embedding)


def initial_parameters(config: MMDiTConfig, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> dict:
    """Freshly initialised parameters as a nested dict of arrays, adaLN-zero."""
    return parameters(MMDiT(config, rngs=rngs, param_dtype=param_dtype))


def time_embedding(config: MMDiTConfig, embedder: dict, t: jax.Array) -> jax.Array:
    """The time embedder alone: parameters `embedder` of it at times t (M,), (M, hidden size)."""
    return scalar_embedding(embedder, config.time_scale * t)


def scalar_embedding(embedder: dict, values: jax.Array) -> jax.Array:
    """An embedder of time, guidance or interval alone, as networks of any type evaluate it.

    Args:
      embedder: its parameters, {"linear_1": {"kernel", "bias"}, "linear_2": ...}.
      values: (M,), multiplied by their factor already.

    Returns:
      (M, hidden size), float32.
    """

    def create():
        layers = Layers(nnx.Rngs(0), jnp.float32, jnp.float32)
        return Embedder(TIME_FREQUENCIES, embedder["linear_2"]["bias"].shape[0], layers)

    return binder(create)(embedder)(sinusoidal_features(values))
