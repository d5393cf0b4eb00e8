"""diffusers' config of FLUX's transformer and ours.

`time_scale` is this program's own key there: what t is multiplied with before it is embedded,
unless it is diffusers' 1000.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_distill.models.mmdit import MMDiTConfig

CLASS = "FluxTransformer2DModel"
TIME_SCALE = 1000.0
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
    if values.get("_class_name", CLASS) != CLASS:
        raise ValueError(
            f"transformer config: {values['_class_name']} is not supported, only {CLASS}"
        )
    if missing := [name for name in _SHARED[:-2] if name not in values]:
        raise ValueError(f"transformer config: '{missing[0]}' is missing")
    for name, only in (("patch_size", 1), ("out_channels", values["in_channels"])):
        if values.get(name) not in (None, only):
            raise ValueError(
                f"transformer config: {name}={values[name]} is not supported; only {only} is"
            )
    shared = {name: values[name] for name in _SHARED if name in values}
    scale = float(values.get("time_scale", TIME_SCALE))
    try:
        return MMDiTConfig(**shared, time_scale=scale, interval_embeds=interval_embeds)
    except ValueError as error:
        raise ValueError(f"transformer config: {error}") from None


def to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    """The config.json that `FluxTransformer2DModel.from_pretrained` reads (JSON-able).

    It warns of a `time_scale` and goes on without.
    """
    own = dataclasses.asdict(config)
    values = {"_class_name": CLASS, "patch_size": 1, "out_channels": None}
    values |= {name: own[name] for name in _SHARED}
    values["axes_dims_rope"] = list(config.axes_dims_rope)
    if config.time_scale != TIME_SCALE:
        values["time_scale"] = config.time_scale
    return values
