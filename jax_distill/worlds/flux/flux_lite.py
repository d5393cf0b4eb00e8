"""The sizes of FLUX.1-lite-8B: the teacher of plans made before one is ported."""

from ml_collections import ConfigDict

from jax_distill import config as configuration

SIZES = {
    "num_layers": 8,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
TEXT_LENGTH = 256  # tokens of T5


def flux_lite(remat: str, resolution: tuple[int, int]) -> ConfigDict:
    """The configuration of a ported FLUX.1-lite-8B.

    Args:
      remat: `model.remat` of its network.
      resolution: height and width of its pictures in pixels.
    """
    teacher = configuration.base()
    with teacher.unlocked():
        teacher.world = "flux"
        teacher.objective = {"name": "flow_matching"}
        teacher.model.update(SIZES | {"remat": remat})
        teacher.data.text_length = TEXT_LENGTH
        teacher.data.resolution = resolution
    return teacher
