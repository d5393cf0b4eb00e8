"""FLUX's multimodal diffusion transformer (MMDiT) in Flax NNX.

Double-stream blocks keep separate weights for text and image tokens and attend jointly;
single-stream blocks run both through the same weights, attention and MLP in parallel. Every block
is modulated (adaLN-zero) by the sum of the time, guidance and pooled-text embeddings. With the same
weights it computes what diffusers' `FluxTransformer2DModel` computes.

Source: Esser et al., arXiv:2403.03206 (MMDiT); FLUX.1, Black Forest Labs, 2024 (single-stream
blocks, rotary positions, guidance embedding).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_distill.flow import Network, Text
from jax_distill.models.binding import binder, parameters
from jax_distill.models.blocks import DoubleBlock, Embedder, Layers, SingleBlock, modulate, placed
from jax_distill.models.mmdit_config import REMAT_POLICIES, MMDiTConfig
from jax_distill.ops.placement import constrain

TIME_FREQUENCIES = 256  # channels of the sinusoidal features of time, guidance and interval


def sinusoidal_features(values: jax.Array) -> jax.Array:
    """Cosines, then sines, at frequencies 1 to 1/10000, as FLUX orders them: (B,) -> (B, 256).

    In float32 or better, whatever the type of the values: a rounded time is another time.
    """
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    half = TIME_FREQUENCIES // 2
    # For values in the thousands the last bit of a frequency shows in the angle: exponents are
    # rounded to float32, as FLUX's are, and so are their exponentials, which numpy's float32 exp
    # would get wrong.
    exponents = -math.log(10000.0) * np.arange(half, dtype=np.float32) / half
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = values[:, None] * frequencies.astype(values.dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotary_table(config: MMDiTConfig, text_tokens: int, grid: tuple[int, int]) -> np.ndarray:
    """Cosine and sine of each token's rotary angles: (2, text + image tokens, head_dim).

    Text tokens sit at (0, 0, 0), the image token in row i and column j at (0, i, j). The two
    channels of a pair share an angle; the sine is negated for the first of them.
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
        """The summed embedding that modulates every block, in float32 or better.

        Args:
          t: (B,) time in [0, 1].
          pooled: (B, P) pooled text embedding.
          guidance: (B,) guidance scale; required if and only if the network embeds it.
          interval: (B,) t - s in [0, 1]; None means zero.

        Returns:
          (B, hidden size).

        Raises:
          ValueError: guidance or an interval is given to a network that does not embed it, or
            guidance is missing for one that does.
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
          ValueError: the grid does not have N tokens, or as for `embedding`.
        """
        embedding, image, _ = self._run(x, t, text, guidance, interval, grid)
        return self._velocity(image, embedding)

    def features(
        self,
        x: jax.Array,
        t: jax.Array,
        text: Text,
        guidance: jax.Array | None = None,
        interval: jax.Array | None = None,
        *,
        blocks: Sequence[int],
        with_velocity: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> Any:
        """Hidden image tokens after chosen blocks, as `Network.features` describes them.

        Raises:
          ValueError: there is no such block, or none is chosen, or as for `__call__`.
        """
        count = self.config.num_layers + self.config.num_single_layers
        chosen = sorted(set(blocks))
        if not chosen or chosen[0] < 0 or chosen[-1] >= count:
            raise ValueError(
                f"blocks: {tuple(blocks)} must be numbers of this network's blocks, from 0 to"
                f" {count - 1}"
            )
        stop = count if with_velocity else chosen[-1] + 1
        embedding, image, kept = self._run(x, t, text, guidance, interval, grid, chosen, stop)
        features = tuple(kept[chosen.index(block)] for block in blocks)
        return (self._velocity(image, embedding), features) if with_velocity else features

    def _velocity(self, image: jax.Array, embedding: jax.Array) -> jax.Array:
        """The final layer, on the image tokens that leave the last block."""
        scale, shift = jnp.split(self.out_modulation(nnx.silu(embedding)), 2, axis=-1)
        return self.image_out(modulate(image, shift, scale))

    def _run(self, x, t, text, guidance, interval, grid, chosen=(), stop=None):
        """The embedding, image tokens after the blocks before `stop`, and after those chosen."""
        grid = square_grid(x.shape[1]) if grid is None else grid
        if grid[0] * grid[1] != x.shape[1]:
            raise ValueError(f"grid: {grid} has {grid[0] * grid[1]} tokens, x has {x.shape[1]}")
        embedding = self.embedding(t, text.pooled, guidance, interval)
        length, doubles = text.sequence.shape[1], self.config.num_layers
        rotary = jnp.asarray(rotary_table(self.config, length, grid))
        image, sequence = placed(self.image_in(x)), placed(self.text_in(text.sequence))

        def double(carry, block):
            return block(*carry, embedding, rotary)

        def single(carry, block):
            return block(carry, embedding, rotary)

        (image, sequence), early = self._scan(
            double,
            (image, sequence),
            self.double_blocks,
            [block for block in chosen if block < doubles],
            None if stop is None else min(stop, doubles),
            image_of=lambda streams: streams[0],
        )
        if stop is not None and stop <= doubles:
            return embedding, image, early
        tokens, late = self._scan(
            single,
            jnp.concatenate([sequence, image], axis=1),
            self.single_blocks,
            [block - doubles for block in chosen if block >= doubles],
            None if stop is None else stop - doubles,
            image_of=lambda tokens: tokens[:, length:],
        )
        return embedding, tokens[:, length:], early + late

    def _scan(
        self,
        body: Callable,
        carry: Any,
        blocks: nnx.Module,
        chosen: Sequence[int],
        stop: int | None,
        image_of: Callable,
    ) -> tuple[Any, tuple[jax.Array, ...]]:
        """Applies a stack of blocks one after another, rematerialised by the policy.

        Args:
          body: (carry, block) -> carry.
          carry: the tokens before the first block.
          blocks: the stack.
          chosen: numbers of the blocks within the stack whose image tokens are kept, ascending.
          stop: the number of blocks to apply where some are chosen.
          image_of: carry -> image tokens.

        Returns:
          The last carry, and the image tokens after each chosen block.
        """
        graph, stacked = nnx.split(blocks)

        def remat(layer):
            if self.config.remat == "none":
                return layer
            policy = REMAT_POLICIES[self.config.remat]
            return jax.checkpoint(layer, policy=policy, prevent_cse=False)

        if not chosen:

            @remat
            def layer(carry, state):
                return body(carry, nnx.merge(graph, state)), None

            return jax.lax.scan(layer, carry, stacked)[0], ()

        # Each layer is read from the whole stack by its number: a slice of the stack, to scan over
        # fewer layers, would be a copy of their parameters.
        @remat
        def numbered(carry, number):
            state = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), stacked
            )
            return body(carry, nnx.merge(graph, state))

        # Each layer writes to the place of the next chosen one, which writes last: only as many
        # outputs are held as were chosen, and one more where layers follow the last of them.
        places = np.searchsorted(chosen, np.arange(stop))
        like = image_of(carry)

        def keep(state, step):
            carry, kept = state
            number, place = step
            carry = numbered(carry, number)
            kept = jax.lax.dynamic_update_index_in_dim(kept, image_of(carry), place, 0)
            return (carry, constrain(kept, None, "batch", "tokens", None)), None

        empty = jnp.zeros((places[-1] + 1, *like.shape), like.dtype)
        (carry, kept), _ = jax.lax.scan(keep, (carry, empty), (np.arange(stop), places))
        return carry, tuple(kept[place] for place in range(len(chosen)))


def square_grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of a square grid of `tokens`; raises ValueError if they make no square."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"grid: {tokens} tokens are not a square; give the rows and columns")
    return side, side


def as_network(config: MMDiTConfig, *, dtype: Any = jnp.float32, grid=None) -> Network:
    """The network as pure functions of a parameter tree, such as `initial_parameters` returns.

    Args:
      config: shape of the network.
      dtype: type of the computation; parameters keep their own.
      grid: rows and columns of image tokens; a square by default.
    """
    bind = binder(lambda: MMDiT(config, rngs=nnx.Rngs(0), dtype=dtype))

    def wide(output):
        return output.astype(jnp.promote_types(output.dtype, jnp.float32))

    def velocity(params, x, t, text, guidance=None, interval=None):
        return wide(bind(params)(x, t, text, guidance, interval, grid=grid))

    def embedding(params, t, text, guidance=None):
        return wide(bind(params).embedding(t, text.pooled, guidance))

    def features(params, x, t, text, guidance=None, interval=None, *, blocks, with_velocity=False):
        output = bind(params).features(
            x, t, text, guidance, interval, blocks=blocks, with_velocity=with_velocity, grid=grid
        )
        return (wide(output[0]), output[1]) if with_velocity else output

    return Network(velocity, embedding, features, grid)


def initial_parameters(config: MMDiTConfig, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> dict:
    """Newly initialised parameters (adaLN-zero) as a nested dict of arrays."""
    return parameters(MMDiT(config, rngs=rngs, param_dtype=param_dtype))


def time_embedding(config: MMDiTConfig, embedder: dict, t: jax.Array) -> jax.Array:
    """The embedding (M, hidden size) of times t (M,) by a time embedder's parameters."""
    return scalar_embedding(embedder, config.time_scale * t)


def scalar_embedding(embedder: dict, values: jax.Array) -> jax.Array:
    """The output of one embedder (of time, guidance or interval), the same in networks of any type.

    Args:
      embedder: its parameters, {"linear_1": {"kernel", "bias"}, "linear_2": ...}.
      values: (M,), already multiplied by their factor.

    Returns:
      (M, hidden size), float32.
    """

    def create():
        layers = Layers(nnx.Rngs(0), jnp.float32, jnp.float32)
        return Embedder(TIME_FREQUENCIES, embedder["linear_2"]["bias"].shape[0], layers)

    return binder(create)(embedder)(sinusoidal_features(values))
