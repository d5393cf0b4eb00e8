"""LoRA: low-rank adapters beside frozen projections, as functions of parameter trees.

A kernel in a network's parameters may be an array, `Quantized`, or `Adapted`: a frozen kernel W
and two thin trained ones, y = x W + (alpha / r) (x A) B. W + (alpha / r) A B is never formed:
beside, an adapter costs r (in + out) / (in out) of the projection's arithmetic, its gradient needs
none of W, and small updates are not lost in the rounding of a bfloat16 W. Stacked kernels have
stacked adapters, which the scan over layers takes apart like all else.

qwix has both LoRA and int8 and does not serve here: it creates adapters as attributes of the
modules that it traces, and our blocks are made anew inside the scan, where what it sets is lost.

Source: Hu et al., arXiv:2106.09685; int8 by channel, as in Dettmers et al., arXiv:2208.07339.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.nnx.nn import dtypes

from jax_distill.models.inputs import INPUTS
from jax_distill.ops.placement import constrain

EMBEDDERS = tuple(x.embedder for x in INPUTS)
"""What a student has of its own: kept whole beside the adapters, whether it is trained or not."""

_LARGEST = 127  # of int8, symmetric


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A kernel (.., in, out) in int8, with the scale (.., 1, out) of each output channel."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index: Any) -> "Quantized":
        """Of the leading axes; Flax reads every parameter as `parameter[...]`."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def dequantized(self) -> jax.Array:
        """(.., in, out) float32."""
        return self.values.astype(jnp.float32) * self.scale


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "lora_a", "lora_b"),
    meta_fields=("scale",),
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen kernel (.., in, out) with an adapter: (.., in, r) and (.., r, out), by `scale`."""

    base: Any  # an array, or Quantized
    lora_a: jax.Array
    lora_b: jax.Array
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def __getitem__(self, index: Any) -> "Adapted":
        """As `Quantized` has it."""
        return jax.tree.map(lambda leaf: leaf[index], self)


Kernel = jax.Array | Quantized | Adapted


def promote_dtype(args: tuple, /, *, dtype: Any = None, **settings: Any) -> list:
    """As Flax's, of (inputs, kernel, bias); what is quantised stays as it is."""
    inputs, kernel, bias = args
    if isinstance(kernel, Adapted):
        inputs, a, b, bias = dtypes.promote_dtype(
            (inputs, kernel.lora_a, kernel.lora_b, bias), dtype=dtype, **settings
        )
        inputs, base, bias = promote_dtype((inputs, kernel.base, bias), dtype=dtype, **settings)
        return [inputs, Adapted(base, a, b, kernel.scale), bias]
    if isinstance(kernel, Quantized):
        inputs, bias = dtypes.promote_dtype((inputs, bias), dtype=dtype, **settings)
        return [inputs, kernel, bias]
    return dtypes.promote_dtype(args, dtype=dtype, **settings)


def dot_general(inputs: jax.Array, kernel: Kernel, *args: Any, **settings: Any) -> jax.Array:
    """As `jax.lax.dot_general` of inputs (.., in) and a kernel (in, out) of any kind.

    A quantised kernel is scaled after the product, which is the same, so that no wide copy of it is
    made outside the product.
    """
    multiply = functools.partial(jax.lax.dot_general, **settings)
    if isinstance(kernel, Adapted):
        beside = multiply(
            multiply(inputs, kernel.lora_a, *args), kernel.scale * kernel.lora_b, *args
        )
        return dot_general(inputs, kernel.base, *args, **settings) + beside
    if isinstance(kernel, Quantized):
        product = multiply(inputs, kernel.values.astype(inputs.dtype), *args)
        return (product * kernel.scale[..., 0, :]).astype(product.dtype)
    return multiply(inputs, kernel, *args)


def dot_side_by_side(
    parts: Sequence[jax.Array], kernel: Kernel, places: tuple = ("heads", "embed"), **settings: Any
) -> jax.Array:
    """The product of inputs, their channels in parts (.., C_i), and a kernel (in, out) of any kind.

    To put the parts side by side, where channels are split over devices, would move nearly all of
    them. So each is multiplied with its rows of the kernel: they are less, and these are moved to
    where they are needed, to `places`, see `ops.placement`.
    """
    side = functools.partial(dot_side_by_side, parts, **settings)
    contracted = (((parts[0].ndim - 1,), (0,)), ((), ()))
    if isinstance(kernel, Adapted):
        thin = side(kernel.lora_a, ("long_heads", None))
        beside = jax.lax.dot_general(thin, kernel.scale * kernel.lora_b, contracted, **settings)
        return side(kernel.base) + beside
    if isinstance(kernel, Quantized):
        product = side(kernel.values.astype(parts[0].dtype))
        return (product * kernel.scale[..., 0, :]).astype(product.dtype)
    ends = itertools.accumulate(part.shape[-1] for part in parts)
    rows = jnp.split(kernel, list(ends)[:-1])
    return sum(
        jax.lax.dot_general(part, constrain(own, *places), contracted, **settings)
        for part, own in zip(parts, rows, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which projections have adapters, and of what kind.

    Attributes:
      rank: r.
      alpha: the adapters count alpha / r times.
      targets: a pattern; kernels have one in whose path, such as `single_blocks/out/kernel`, it
        finds a match.
    """

    rank: int
    alpha: float
    targets: str

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank: {self.rank} is not at least 1")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"targets: {self.targets!r} is no pattern: {error}") from None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def kernels(self, params: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Paths of the kernels that have adapters; `params` has leaves with a shape.

        Raises:
          ValueError: there are none, or the rank is no less than a side of one.
        """
        paths = [path for path in _flat(params) if _is_kernel(path)]
        found = [path for path in paths if re.search(self.targets, "/".join(path))]
        if not found:
            example = "/".join(paths[-1]) if paths else "none"
            raise ValueError(
                f"targets: {self.targets!r} matches no projection; their paths are such as"
                f" '{example}'"
            )
        for path in found:
            side = min(_flat(params)[path].shape[-2:])
            if self.rank >= side:
                raise ValueError(
                    f"rank: {self.rank} is not less than {side}, the smaller side of"
                    f" '{'/'.join(path)}'"
                )
        return found

    def split(self, key: jax.Array, params: Mapping[str, Any]) -> dict[str, Any]:
        """The trained part of a network: adapters, and the student's own embedders.

        Args:
          key: of the adapters that are new. A is uniform in +-1/sqrt(in), B zero.
          params: of the whole network; adapters in it are taken over.

        Returns:
          A tree with `lora_a` (.., in, r) and `lora_b` (.., r, out) in the places of kernels.

        Raises:
          ValueError: as `kernels`.
        """
        flat, state = _flat(params), {}
        for number, path in enumerate(self.kernels(params)):
            kernel = flat[path]
            if isinstance(kernel, Adapted):
                a, b = kernel.lora_a, kernel.lora_b
            else:
                *layers, inputs, outputs = kernel.shape
                reach = inputs**-0.5
                key_a = jax.random.fold_in(key, number)
                a = jax.random.uniform(
                    key_a, (*layers, inputs, self.rank), minval=-reach, maxval=reach
                )
                b = jnp.zeros((*layers, self.rank, outputs))
            state[*path[:-1], "lora_a"], state[*path[:-1], "lora_b"] = a, b
        own = {path: leaf for path, leaf in flat.items() if path[0] in EMBEDDERS}
        return traverse_util.unflatten_dict(state | own)

    def attach(self, base: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
        """The whole network: frozen parameters, those of `state` in their places.

        Args:
          base: of the teacher; its own embedders, and adapters, are left out.
          state: as `split` makes it.

        Raises:
          ValueError: it has no adapters, or adapters of another rank.
        """
        flat, beside = _flat(base), _flat(state)
        ranks = {leaf.shape[-1] for path, leaf in beside.items() if path[-1] == "lora_a"}
        if ranks != {self.rank}:
            found = f"adapters of rank {', '.join(map(str, sorted(ranks)))}" if ranks else "none"
            raise ValueError(
                f"lora.rank: {self.rank}, but what was trained has {found}; put the run's"
                " config.json back"
            )
        whole = {path: leaf for path, leaf in flat.items() if path[0] not in EMBEDDERS}
        for path, leaf in whole.items():
            whole[path] = leaf.base if isinstance(leaf, Adapted) else leaf
        for path, leaf in beside.items():
            if path[-1] == "lora_a":
                kernel = (*path[:-1], "kernel")
                b = beside[*path[:-1], "lora_b"]
                whole[kernel] = Adapted(whole[kernel], leaf, b, self.scale)
            elif path[-1] != "lora_b":
                whole[path] = leaf
        return traverse_util.unflatten_dict(whole)


def merged(params: dict[str, Any]) -> dict[str, Any]:
    """The network with plain kernels W + (alpha / r) A B, of W's type; float32 if quantised."""
    flat = _flat(params)
    for path, leaf in flat.items():
        if isinstance(leaf, Adapted | Quantized):
            flat[path] = _merge(leaf)
    return traverse_util.unflatten_dict(flat)


@jax.jit
def _merge(kernel: Adapted | Quantized) -> jax.Array:
    if len(kernel.shape) > 2:
        return jax.lax.map(_merge, kernel)
    if isinstance(kernel, Quantized):
        return kernel.dequantized()
    base, quantized = kernel.base, isinstance(kernel.base, Quantized)
    wide = base.dequantized() if quantized else base.astype(jnp.float32)
    a, b = (leaf.astype(wide.dtype) for leaf in (kernel.lora_a, kernel.lora_b))
    wide += kernel.scale * jnp.dot(a, b, precision="highest")
    return wide if quantized else wide.astype(base.dtype)


def quantized(params: Mapping[str, Any]) -> dict[str, Any]:
    """Frozen parameters with the plain kernels of the blocks, most of all there are, in int8."""
    flat = _flat(params)
    for path, leaf in flat.items():
        plain = not isinstance(leaf, Quantized | Adapted)
        if _is_kernel(path) and path[0].endswith("blocks") and plain:
            flat[path] = quantize(leaf)
    return traverse_util.unflatten_dict(flat)


@jax.jit
def quantize(kernel: jax.Array) -> Quantized:
    """(.., in, out) in int8: symmetric, one scale an output channel, rounded to nearest."""
    if kernel.ndim > 2:
        return jax.lax.map(quantize, kernel)
    wide = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=0, keepdims=True) / _LARGEST
    values = jnp.round(wide / jnp.where(scale == 0, 1, scale))
    return Quantized(values.astype(jnp.int8), scale)


def _is_kernel(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel" and path[0] not in EMBEDDERS


def _flat(params: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(params)
