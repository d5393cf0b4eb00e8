"""Discriminator heads: small convolutional networks on the hidden tokens of a velocity network.

There is one head for each chosen block, independent of the others. All of them are one parameter
tree, "block_3" for the head of block 3, and pure functions of it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_distill.models.binding import binder, parameters
from jax_distill.models.mmdit import TIME_FREQUENCIES, sinusoidal_features
from jax_distill.ops.placement import constrain

DIRECTIONS = 64
"""Channels of a projected head's output, and of the condition that they are projected on."""


def _group_norm(width: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Over 32 groups, or fewer so that none has less than 16 channels: tokens may be few."""
    groups = math.gcd(32, max(width // 16, 1), width)
    return nnx.GroupNorm(width, num_groups=groups, epsilon=1e-5, rngs=rngs)


def _placed(x: jax.Array) -> jax.Array:
    """Places a layer's output (B, ...), a sum over devices, before its use, see `blocks.placed`."""
    return constrain(x, "batch", *[None] * (x.ndim - 1))


def _activation(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.2)


class ConvHead(nnx.Module):
    """One logit a sample: the mean over a picture at half its resolution.

    Source: the discriminator of FastGen, after DMD2's (arXiv:2405.14867).
    """

    def __init__(self, hidden: int, width: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(hidden, width, (4, 4), strides=2, padding="SAME", rngs=rngs)
        self.norm = _group_norm(width, rngs)
        self.out = nnx.Conv(width, 1, (1, 1), rngs=rngs)

    def __call__(self, image: jax.Array, condition: jax.Array | None) -> jax.Array:
        del condition
        x = _activation(self.norm(_placed(self.conv(_placed(image)))))
        return jnp.mean(_placed(self.out(x)), (1, 2))


class ProjectedHead(nnx.Module):
    """One logit a token, its features projected on what time and caption ask for.

    Source: LADD, arXiv:2403.12015, after StyleGAN-T, arXiv:2301.09515.
    """

    def __init__(self, hidden: int, width: int, pooled: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(hidden, width, (1, 1), rngs=rngs)
        self.norm = _group_norm(width, rngs)
        self.residual = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.residual_norm = _group_norm(width, rngs)
        self.out = nnx.Conv(width, DIRECTIONS, (1, 1), rngs=rngs)
        self.condition = nnx.Linear(TIME_FREQUENCIES + pooled, DIRECTIONS, rngs=rngs)

    def __call__(self, image: jax.Array, condition: jax.Array | None) -> jax.Array:
        x = _placed(_activation(self.norm(_placed(self.conv(_placed(image))))))
        residual = _activation(self.residual_norm(_placed(self.residual(x))))
        found = _placed(self.out(_placed((x + residual) / math.sqrt(2))))
        wanted = _placed(self.condition(condition)) / math.sqrt(DIRECTIONS)
        return jnp.einsum("brcd,bd->brc", found, wanted).reshape(len(image), -1)


def _create(hidden: int, width: int, pooled: int | None, key: Any = 0) -> nnx.Module:
    rngs = nnx.Rngs(key)
    if pooled is None:
        return ConvHead(hidden, width, rngs=rngs)
    return ProjectedHead(hidden, width, pooled, rngs=rngs)


def init_heads(
    key: jax.Array, blocks: Sequence[int], hidden: int, width: int, pooled: int | None = None
) -> dict:
    """New heads.

    Args:
      key: of their parameters.
      blocks: numbers of the blocks whose tokens they read.
      hidden: channels of a token.
      width: channels within a head.
      pooled: channels of the pooled caption, for heads that see time and caption
        (`ProjectedHead`); None for those that do not (`ConvHead`).
    """
    keys = {n: jax.random.fold_in(key, n) for n in blocks}
    return {f"block_{n}": parameters(_create(hidden, width, pooled, keys[n])) for n in blocks}


def logits(
    heads: dict,
    features: Sequence[jax.Array],
    blocks: Sequence[int],
    grid: tuple[int, int] | None,
    t: jax.Array | None = None,
    pooled: jax.Array | None = None,
) -> jax.Array:
    """How real a sample looks to each head: above zero is real.

    Args:
      heads: of `init_heads`.
      features: hidden tokens (B, N, hidden), one array a block.
      blocks: their numbers.
      grid: rows and columns of the tokens, row-major.
      t: (B,), times of the samples, for heads that see them.
      pooled: (B, P), pooled captions, likewise.

    Returns:
      (B, K) in float32 or better: one logit for each head, or for each head and token.

    Raises:
      ValueError: the tokens do not lie on such a grid.
    """
    if grid is None or grid[0] * grid[1] != features[0].shape[1]:
        raise ValueError(
            f"grid: {features[0].shape[1]} tokens do not lie on a grid of {grid}; give the network"
            " its rows and columns"
        )
    condition = None
    if pooled is not None:
        condition = jnp.concatenate([sinusoidal_features(1000 * t), pooled], -1)
    found = []
    for number, tokens in zip(blocks, features, strict=True):
        head = heads[f"block_{number}"]
        width = head["norm"]["scale"].shape[0]
        sees = pooled.shape[-1] if "condition" in head else None
        create = functools.partial(_create, tokens.shape[-1], width, sees)
        image = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32)).reshape(
            len(tokens), *grid, -1
        )
        found.append(binder(create)(head)(image, condition))
    return jnp.concatenate(found, -1)
