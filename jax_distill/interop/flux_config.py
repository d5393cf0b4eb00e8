"""diffusers' config of FLUX's transformer and ours.

`time_scale` and `guidance_factor` are this program's own keys there: what t and the guidance scale
are multiplied with before they are embedded; `objective` is what the network was trained for, and
`objective_settings` how, which its sampler depends on. All are there unless they are those of
diffusers' own networks: 1000, 1000, "flow_matching".
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jax_distill.models.mmdit import MMDiTConfig
from jax_distill.storage.quoting import shown

CLASS = "FluxTransformer2DModel"
TIME_SCALE = GUIDANCE_FACTOR = 1000.0  # diffusers'
FACTORS = {"time_scale": TIME_SCALE, "guidance_factor": GUIDANCE_FACTOR}
"""The factors of a network's embedders, where its config does not say."""


class Purpose(NamedTuple):
    """The use of a network.

    Attributes:
      objective: that it was trained for.
      guidance: "cfg" for teachers under classifier-free guidance, "auto" for all others.
      objective_settings: of a student, as JSON; "" for teachers, whose scheduler says it all.
    """

    objective: str = "flow_matching"
    guidance: str = "auto"
    objective_settings: str = ""


_STOCK = {**FACTORS, "objective": "flow_matching", "guidance": "auto"}
OWN_KEYS = (*FACTORS, *Purpose._fields)
FLUX_AXES = (16, 56, 56)
_SHARED = (
    "in_channels",
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)


def from_diffusers(values: Mapping[str, Any], *, interval_embeds: bool = False) -> MMDiTConfig:
    """Reads the config.json of a `FluxTransformer2DModel`.

    Args:
      values: diffusers' keys.
      interval_embeds: whether the second time embedder is there; the config does not say.

    Raises:
      ValueError: a size is missing, or the config is of another network.
    """
    if (kind := values.get("_class_name", CLASS)) != CLASS:
        raise ValueError(f"transformer config: {shown(kind)} is not supported, only {CLASS}")
    if missing := [name for name in _SHARED[:-2] if name not in values]:
        raise ValueError(f"transformer config: '{missing[0]}' is missing")
    for name, only in (("patch_size", 1), ("out_channels", values["in_channels"])):
        if (found := values.get(name)) not in (None, only):
            raise ValueError(
                f"transformer config: {name}={shown(found)} is not supported; only {shown(only)} is"
            )
    shared = {name: values[name] for name in _SHARED if name in values}
    try:
        own = {name: factor(name, values.get(name, stock)) for name, stock in FACTORS.items()}
        return MMDiTConfig(**shared, **own, interval_embeds=interval_embeds)
    except ValueError as error:
        raise ValueError(f"transformer config: {error}") from None


def factor(name: str, value: Any) -> float:
    """A factor of `FACTORS` as a config or the header of a file has it: a number, or its digits.

    Raises:
      ValueError: it is none, or not a positive one.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: {shown(value)} is not a positive number")
    return number


def to_diffusers(config: MMDiTConfig, purpose: Purpose = Purpose()) -> dict[str, Any]:  # noqa: B008
    """The config.json that `FluxTransformer2DModel.from_pretrained` reads (JSON-able).

    It warns of this program's own keys and goes on without.

    Args:
      config: of the network.
      purpose: of the network.
    """
    shared = dataclasses.asdict(config)
    values = {"_class_name": CLASS, "patch_size": 1, "out_channels": None}
    values |= {name: shared[name] for name in _SHARED}
    values["axes_dims_rope"] = list(config.axes_dims_rope)
    own = own_values(config, purpose)
    return values if own == _STOCK else values | own


def own_values(config: MMDiTConfig, purpose: Purpose) -> dict[str, Any]:
    """This program's own keys and their values, without settings where there are none."""
    own = {name: getattr(config, name) for name in FACTORS} | purpose._asdict()
    return {name: value for name, value in own.items() if value != ""}


def has_interval(names: Iterable[str]) -> bool:
    """Whether a transformer's tensors have the second time embedder among them."""
    return any(name.startswith("timestep_embedder2.") for name in names)


def from_shapes(
    where: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    axes_dims_rope: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The config of a transformer whose file has none, from its tensors.

    Args:
      where: for messages.
      shapes: under diffusers' names.
      axes_dims_rope: likewise not in the tensors; FLUX.1's by default.

    Returns:
      What `from_diffusers` reads, without this program's own keys.

    Raises:
      ValueError: tensors that say the sizes are missing, or have no such shape.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != axes:
            raise ValueError(
                f"{where}: tensor '{name}' is missing; it is not a transformer of FLUX"
            )
        return shapes[name]

    def layers(kind: str) -> int:
        found = {int(m[1]) for name in shapes if (m := re.match(rf"{kind}\.(\d{{1,300}})\.", name))}
        if missing := set(range(len(found))) - found:
            raise ValueError(
                f"{where}: tensors of '{kind}.{min(missing)}' are missing, and there are some of"
                f" '{kind}.{max(found)}'; download it again"
            )
        return len(found)

    width, channels = shape("x_embedder.weight", 2)
    (head,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    if not head:
        raise ValueError(f"{where}: heads are 0 wide; it is not a transformer of FLUX")
    if axes_dims_rope is None and head != sum(FLUX_AXES):
        raise ValueError(
            f"{where}: heads are {head} wide where FLUX.1's are {sum(FLUX_AXES)}, so that its"
            " positions are not known; give --base=DIR, a ported folder of such a network"
        )
    return {
        "_class_name": CLASS,
        "patch_size": 1,
        "in_channels": channels,
        "num_layers": layers("transformer_blocks"),
        "num_single_layers": layers("single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape("context_embedder.weight", 2)[1],
        "pooled_projection_dim": shape("time_text_embed.text_embedder.linear_1.weight", 2)[1],
        "guidance_embeds": any(".guidance_embedder." in name for name in shapes),
        "axes_dims_rope": list(axes_dims_rope or FLUX_AXES),
    }
