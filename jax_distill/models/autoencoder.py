"""The latent autoencoder of FLUX: `AutoencoderKL` of diffusers without quant convolutions.

Pictures are (B, H, W, 3) in [-1, 1] and latents (B, H/8, W/8, 16) at four levels; everything is
channels-last. Latent Diffusion (Rombach et al. 2022, arXiv:2112.10752), section 3.1 and appendix E.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_distill.models.sizes import check_positive, check_size, check_sizes, checked_sequence
from jax_distill.storage.quoting import shown

_EPSILON = 1e-6
_MOST_LEVELS, _MOST_BLOCKS = 8, 8  # more than any autoencoder has; each takes time to make

# _PARITY[p, a, i] = 1 where entry i of a kernel over a doubled axis reads input a of its two, for
# outputs of parity p.
_PARITY = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)

# Other keys of diffusers' config, and the only value that this network supports.
_FIXED = {
    "out_channels": lambda c: c.in_channels,
    "act_fn": lambda c: "silu",
    "down_block_types": lambda c: ["DownEncoderBlock2D"] * len(c.block_out_channels),
    "up_block_types": lambda c: ["UpDecoderBlock2D"] * len(c.block_out_channels),
    "mid_block_add_attention": lambda c: True,
    "use_quant_conv": lambda c: False,
    "use_post_quant_conv": lambda c: False,
    "latents_mean": lambda c: None,
    "latents_std": lambda c: None,
}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder; the defaults are those of FLUX.1.

    Attributes:
      in_channels: channels of a picture.
      latent_channels: channels of a latent.
      block_out_channels: width of each level, finest first; each level after the first halves the
        height and the width.
      layers_per_block: residual blocks a level in the encoder (the decoder has one more).
      norm_num_groups: groups of every group normalisation; divides every width.
      scaling_factor: multiplies centred latents for the transformer.
      shift_factor: the mean of the latents.
    """

    in_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        widths = checked_sequence(
            "block_out_channels", self.block_out_channels, longest=_MOST_LEVELS
        )
        object.__setattr__(self, "block_out_channels", widths)
        check_sizes(self, ("in_channels", "latent_channels", "norm_num_groups"))
        check_size("layers_per_block", self.layers_per_block, most=_MOST_BLOCKS)
        check_positive(self, ("scaling_factor",))
        shift = self.shift_factor
        if isinstance(shift, bool) or not isinstance(shift, int | float) or not abs(shift) < 1e30:
            raise ValueError(f"shift_factor: {shown(shift)} is not a finite number")
        for width in self.block_out_channels:
            check_size("block_out_channels", width)
            if width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {width} is not a multiple of norm_num_groups="
                    f"{self.norm_num_groups}; choose widths that are."
                )

    @property
    def downsampling(self) -> int:
        """Pixels a latent position spans along each axis (8 at four levels)."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AutoencoderConfig":
        """Reads the config.json of a diffusers `AutoencoderKL`.

        Args:
          values: diffusers' keys; those that do not change the function (`sample_size`, names that
            start with an underscore, ..) are ignored. A `shift_factor` of None is none, 0.

        Raises:
          ValueError: a size is missing, or the network does not support a value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"autoencoder config: {missing[0]!r} is missing.")
        given = {name: values[name] for name in names}
        if given["shift_factor"] is None:
            given["shift_factor"] = 0.0
        config = cls(**given)
        for key, expected in _FIXED.items():
            want, got = expected(config), values.get(key)
            if isinstance(got, tuple):
                got = list(got)
            if got != want and key in values:
                raise ValueError(
                    f"autoencoder config: {key}={shown(got)} is not supported; only {want!r} is."
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The config.json that diffusers' `AutoencoderKL.from_config` reads (JSON-able)."""
        own = dataclasses.asdict(self) | {"block_out_channels": list(self.block_out_channels)}
        fixed = {key: value(self) for key, value in _FIXED.items()}
        return {"_class_name": "AutoencoderKL"} | own | fixed


class Posterior(NamedTuple):
    """The diagonal Gaussian over latents, mean and log variance of shape (B, h, w, c)."""

    mean: jax.Array
    logvar: jax.Array


def _conv(
    features_in: int, features_out: int, size: int = 3, *, rngs: nnx.Rngs, dtype: jnp.dtype
) -> nnx.Conv:
    return nnx.Conv(
        features_in, features_out, (size, size), padding=size // 2, dtype=dtype, rngs=rngs
    )


class GroupNorm(nnx.Module):
    """Group normalisation over height, width and the channels of a group, in float32.

    It first reduces each channel over space and then the few channel means over a group, so that
    the large reductions keep the channels-last layout: about twice as fast as `nnx.GroupNorm` on
    CPU. The variance is that of the centred values.
    """

    def __init__(self, features: int, groups: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        del rngs  # the initial values are constants
        self.groups, self.dtype = groups, dtype
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def _mean(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) to the mean of each channel's group, (B, 1, 1, C)."""
        b, _, _, c = x.shape
        mean = x.mean((1, 2)).reshape(b, self.groups, c // self.groups).mean(-1)
        return mean.repeat(c // self.groups, axis=1)[:, None, None]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - self._mean(x)
        gain = jax.lax.rsqrt(self._mean(jnp.square(x)) + _EPSILON) * self.scale
        return (x * gain + self.bias).astype(self.dtype)


class ResnetBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        groups: int,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        kw = {"rngs": rngs, "dtype": dtype}
        self.norm1 = GroupNorm(features_in, groups, **kw)
        self.conv1 = _conv(features_in, features_out, **kw)
        self.norm2 = GroupNorm(features_out, groups, **kw)
        self.conv2 = _conv(features_out, features_out, **kw)
        same = features_in == features_out
        self.shortcut = None if same else _conv(features_in, features_out, 1, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """Residual self-attention of one head over all positions of a picture."""

    def __init__(self, features: int, groups: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm = GroupNorm(features, groups, rngs=rngs, dtype=dtype)
        self.query, self.key, self.value, self.out = (
            nnx.Linear(features, features, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = self.norm(x).reshape(b, h * w, 1, c)
        y = jax.nn.dot_product_attention(self.query(y), self.key(y), self.value(y))
        return x + self.out(y.reshape(b, h, w, c))


class Middle(nnx.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, features: int, groups: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        kw = {"rngs": rngs, "dtype": dtype}
        self.resnet_in = ResnetBlock(features, features, groups, **kw)
        self.attention = AttentionBlock(features, groups, **kw)
        self.resnet_out = ResnetBlock(features, features, groups, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.resnet_out(self.attention(self.resnet_in(x)))


class Downsample(nnx.Module):
    """Halves height and width: 3x3 convolution of stride 2, padded below and right only."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.conv = nnx.Conv(
            features, features, (3, 3), 2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution.

    Computed at the low resolution. A row of the output sees two distinct input rows, and which
    ones depends on its parity only; likewise columns. So each of the four parities is a 2x2
    convolution with sums of the 3x3 kernel's entries: 4/9 of the multiplications.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.conv = _conv(features, features, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        x = x.astype(self.conv.dtype)
        kernels = jnp.einsum("pai,qbj,ijcd->pqabcd", _PARITY, _PARITY, self.conv.kernel[...])
        kernels = kernels.astype(self.conv.dtype)

        def parity(p: int, q: int) -> jax.Array:
            padding = ((1 - p, p), (1 - q, q))
            return jax.lax.conv_general_dilated(
                x, kernels[p, q], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        rows = [jnp.stack([parity(p, q) for q in (0, 1)], axis=3) for p in (0, 1)]
        y = jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, c)  # from (B, h, 2, w, 2, c)
        return y + self.conv.bias[...].astype(self.conv.dtype)


class Level(nnx.Module):
    """Residual blocks at one resolution, then the change of resolution, if any."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        layers: int,
        groups: int,
        resample: type[Downsample] | type[Upsample] | None,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        kw = {"rngs": rngs, "dtype": dtype}
        widths = [features_in] + [features_out] * layers
        self.resnets = nnx.List(
            ResnetBlock(a, b, groups, **kw) for a, b in itertools.pairwise(widths)
        )
        self.resample = None if resample is None else resample(features_out, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.resample is None else self.resample(x)


class Encoder(nnx.Module):
    """Pictures (B, H, W, 3) to mean and log variance, side by side: (B, h, w, 2c)."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        kw = {"rngs": rngs, "dtype": dtype}
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = _conv(config.in_channels, widths[0], **kw)
        self.levels = nnx.List(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block,
                groups,
                None if i == len(widths) - 1 else Downsample,
                **kw,
            )
            for i, width in enumerate(widths)
        )
        self.middle = Middle(widths[-1], groups, **kw)
        self.norm_out = GroupNorm(widths[-1], groups, **kw)
        self.conv_out = _conv(widths[-1], 2 * config.latent_channels, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(nnx.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """Latents (B, h, w, c) to pictures (B, H, W, 3); levels are stored coarsest first."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        kw = {"rngs": rngs, "dtype": dtype}
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = _conv(config.latent_channels, widths[0], **kw)
        self.middle = Middle(widths[0], groups, **kw)
        self.levels = nnx.List(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block + 1,
                groups,
                None if i == len(widths) - 1 else Upsample,
                **kw,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = GroupNorm(widths[-1], groups, **kw)
        self.conv_out = _conv(widths[-1], config.in_channels, **kw)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class Autoencoder(nnx.Module):
    """FLUX's autoencoder: pictures to a Gaussian over latents, and latents to pictures."""

    def __init__(
        self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32
    ):
        """Makes a randomly initialised autoencoder.

        Args:
          config: the sizes.
          rngs: source of the initial parameters (which are float32).
          dtype: type of the computation.
        """
        self.config = config
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype)

    def check_size(self, images: jax.Array) -> None:
        """Raises ValueError if height or width of (B, H, W, 3) cannot be halved at every level."""
        multiple = self.config.downsampling
        if images.shape[1] % multiple or images.shape[2] % multiple:
            raise ValueError(
                f"images: height and width {images.shape[1:3]} are not multiples of {multiple};"
                " resize or crop them."
            )

    def encode(self, images: jax.Array) -> Posterior:
        """Encodes pictures.

        Args:
          images: (B, H, W, 3) in [-1, 1]; H and W are multiples of `config.downsampling`.

        Returns:
          Mean and log variance (clipped to [-30, 20]), (B, h, w, c), raw: the transformer's
          latents are `normalize` of them.

        Raises:
          ValueError: if H or W is not such a multiple.
        """
        self.check_size(images)
        return posterior(self.encoder(images))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes raw latents (B, h, w, c) to pictures (B, H, W, 3), about in [-1, 1]."""
        return self.decoder(latents)

    def normalize(self, latents: jax.Array) -> jax.Array:
        """Raw latents to the transformer's: (z - shift) * scale."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """The transformer's latents to raw ones: z / scale + shift."""
        return latents / self.config.scaling_factor + self.config.shift_factor


def posterior(moments: jax.Array) -> Posterior:
    """The Gaussian that the encoder's output (B, h, w, 2c) stands for."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))


def sample_posterior(posterior: Posterior, key: jax.Array) -> jax.Array:
    """Draws latents (B, h, w, c): ``mean + exp(logvar / 2) n``, n ~ N(0, 1)."""
    noise = jax.random.normal(key, posterior.mean.shape, posterior.mean.dtype)
    return posterior.mean + jnp.exp(0.5 * posterior.logvar) * noise


def pack(latents: jax.Array) -> jax.Array:
    """Turns each 2x2 patch of latents into a token, as FLUX does.

    Args:
      latents: (B, h, w, c).

    Returns:
      (B, h/2 * w/2, 4c): tokens in row-major order, entries channel first, then the patch's rows
      and columns (diffusers' `FluxPipeline._pack_latents`).

    Raises:
      ValueError: if h or w is odd.
    """
    b, h, w, c = latents.shape
    if h % 2 or w % 2:
        raise ValueError(f"latents: height and width ({h}, {w}) must be even to pack 2x2 patches.")
    x = latents.reshape(b, h // 2, 2, w // 2, 2, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: jax.Array, height: int, width: int) -> jax.Array:
    """The inverse of `pack`.

    Args:
      tokens: (B, height/2 * width/2, 4c).
      height: of the latents (pixels / 8).
      width: of the latents.

    Returns:
      (B, height, width, c).

    Raises:
      ValueError: if the tokens cannot tile a height by width latent.
    """
    b, n, c = tokens.shape
    if height % 2 or width % 2 or n != height * width // 4 or c % 4:
        raise ValueError(
            f"tokens: shape {tokens.shape} does not unpack to latents of height {height} and "
            f"width {width}; that takes (B, {height / 2:g} * {width / 2:g}, 4c)."
        )
    x = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, height, width, c // 4)
