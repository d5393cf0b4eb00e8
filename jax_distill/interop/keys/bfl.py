"""Black Forest Labs' own names for FLUX's transformer (`flux1-*.safetensors`) and diffusers'.

Some of their tensors are several of diffusers' below one another, and the last modulation has shift
and scale the other way round.

Source: github.com/black-forest-labs/flux, src/flux/model.py; the same as diffusers'
`convert_flux_transformer_checkpoint_to_diffusers`.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jax_distill.interop.tensors import Tensor, Tensors


class _Rule(NamedTuple):
    """A tensor of theirs and the tensors of diffusers' that it is made of, rows upon rows.

    `weights` are the relative heights of those; `{block}` is an index.
    """

    theirs: str
    diffusers: tuple[str, ...]
    weights: tuple[int, ...] = (1,)


def _linear(theirs: str, *diffusers: str, weights: tuple[int, ...] = (1,)) -> Iterator[_Rule]:
    for end in ("weight", "bias"):
        yield _Rule(f"{theirs}.{end}", tuple(f"{name}.{end}" for name in diffusers), weights)


def _embedder(theirs: str, diffusers: str) -> Iterator[_Rule]:
    yield from _linear(f"{theirs}.in_layer", f"time_text_embed.{diffusers}.linear_1")
    yield from _linear(f"{theirs}.out_layer", f"time_text_embed.{diffusers}.linear_2")


def _stream(theirs: str, diffusers: dict[str, str]) -> Iterator[_Rule]:
    """One stream of the double blocks."""
    block, ours = f"double_blocks.{{block}}.{theirs}", "transformer_blocks.{block}."
    names = {key: ours + name for key, name in diffusers.items()}
    yield from _linear(f"{block}_mod.lin", names["modulation"])
    qkv = (names["query"], names["key"], names["value"])
    yield from _linear(f"{block}_attn.qkv", *qkv, weights=(1, 1, 1))
    yield _Rule(f"{block}_attn.norm.query_norm.scale", (names["query_norm"] + ".weight",))
    yield _Rule(f"{block}_attn.norm.key_norm.scale", (names["key_norm"] + ".weight",))
    yield from _linear(f"{block}_attn.proj", names["out"])
    yield from _linear(f"{block}_mlp.0", names["mlp_in"])
    yield from _linear(f"{block}_mlp.2", names["mlp_out"])


_SINGLE, _OURS = "single_blocks.{block}", "single_transformer_blocks.{block}"
_LAST = "final_layer.adaLN_modulation.1"

_RULES = (
    *_linear("img_in", "x_embedder"),
    *_linear("txt_in", "context_embedder"),
    *_embedder("time_in", "timestep_embedder"),
    *_embedder("guidance_in", "guidance_embedder"),
    *_embedder("vector_in", "text_embedder"),
    *_stream(
        "img",
        {
            "modulation": "norm1.linear",
            "query": "attn.to_q",
            "key": "attn.to_k",
            "value": "attn.to_v",
            "query_norm": "attn.norm_q",
            "key_norm": "attn.norm_k",
            "out": "attn.to_out.0",
            "mlp_in": "ff.net.0.proj",
            "mlp_out": "ff.net.2",
        },
    ),
    *_stream(
        "txt",
        {
            "modulation": "norm1_context.linear",
            "query": "attn.add_q_proj",
            "key": "attn.add_k_proj",
            "value": "attn.add_v_proj",
            "query_norm": "attn.norm_added_q",
            "key_norm": "attn.norm_added_k",
            "out": "attn.to_add_out",
            "mlp_in": "ff_context.net.0.proj",
            "mlp_out": "ff_context.net.2",
        },
    ),
    *_linear(f"{_SINGLE}.modulation.lin", f"{_OURS}.norm.linear"),
    *_linear(
        f"{_SINGLE}.linear1",
        *(f"{_OURS}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        weights=(1, 1, 1, 4),
    ),
    _Rule(f"{_SINGLE}.norm.query_norm.scale", (f"{_OURS}.attn.norm_q.weight",)),
    _Rule(f"{_SINGLE}.norm.key_norm.scale", (f"{_OURS}.attn.norm_k.weight",)),
    *_linear(f"{_SINGLE}.linear2", f"{_OURS}.proj_out"),
    *_linear("final_layer.linear", "proj_out"),
    *_linear(_LAST, "norm_out.linear"),
)
_PATTERNS = [
    (re.compile(re.escape(rule.theirs).replace(r"\{block\}", r"(?P<block>\d+)")), rule)
    for rule in _RULES
]


def to_diffusers(where: str, tensors: Tensors) -> Tensors:
    """The same tensors under diffusers' names; those that are parts are read as parts.

    Args:
      where: for messages.
      tensors: under their names.

    Raises:
      ValueError: a name is not one of theirs, or rows cannot be shared out.
    """
    result = {}
    for name, tensor in tensors.items():
        found = ((pattern.fullmatch(name), rule) for pattern, rule in _PATTERNS)
        match, rule = next((pair for pair in found if pair[0]), (None, None))
        if match is None:
            raise ValueError(f"{where}: tensor '{name}' is not expected in BFL's layout")
        rows = tensor.shape[0] if tensor.shape else 0
        if rows % sum(rule.weights) or (name.startswith(_LAST) and rows % 2):
            raise ValueError(
                f"{where}: tensor '{name}' has {rows} rows, which are no multiple of"
                f" {sum(rule.weights)}"
            )
        if name.startswith(_LAST):
            result[rule.diffusers[0].format(**match.groupdict())] = _swapped(tensor)
            continue
        start = 0
        for part, weight in zip(rule.diffusers, rule.weights):
            stop = start + rows // sum(rule.weights) * weight
            result[part.format(**match.groupdict())] = _rows(tensor, start, stop)
            start = stop
    return result


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    if (start, stop) == (0, tensor.shape[0]):
        return tensor
    return Tensor((stop - start, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read(start, stop))


def _swapped(tensor: Tensor) -> Tensor:
    """The second half of the rows before the first."""

    def read() -> np.ndarray:
        shift, scale = np.split(tensor.read(), 2)
        return np.concatenate([scale, shift])

    return tensor._replace(read=read)
