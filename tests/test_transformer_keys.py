"""FLUX's state dict and our parameters hold the same numbers; what does not fit is named."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
import random_flux
import torch

from jax_distill.interop.keys.transformer import TRANSFORMER_KEYS
from jax_distill.models.mmdit import MMDiTConfig

CONFIG = MMDiTConfig(
    in_channels=6,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=10,
    pooled_projection_dim=12,
    guidance_embeds=True,
    axes_dims_rope=(4, 2, 2),
)
WITHOUT_GUIDANCE = dataclasses.replace(CONFIG, guidance_embeds=False)
WITH_INTERVAL = dataclasses.replace(CONFIG, interval_embeds=True)
INTERVAL_SHAPES = {
    "timestep_embedder2.linear_1.weight": (16, 256),
    "timestep_embedder2.linear_1.bias": (16,),
    "timestep_embedder2.linear_2.weight": (16, 16),
    "timestep_embedder2.linear_2.bias": (16,),
}


def _random(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), shapes)


@pytest.fixture(scope="module")
def theirs():
    return random_flux.state_dict(random_flux.reference(CONFIG))


@pytest.mark.parametrize("config", [CONFIG, WITHOUT_GUIDANCE], ids=["guidance", "no_guidance"])
def test_from_diffusers_and_back_is_exact(config):
    theirs = random_flux.state_dict(random_flux.reference(config))
    ours = TRANSFORMER_KEYS.to_jax(theirs, random_flux.shapes(config))
    back = TRANSFORMER_KEYS.from_jax(ours)
    assert back.keys() == theirs.keys()
    for name, array in theirs.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array, name)


def test_to_diffusers_and_back_is_exact():
    ours = _random(random_flux.shapes(CONFIG))
    model = random_flux.reference(CONFIG)
    tensors = {k: torch.from_numpy(v) for k, v in TRANSFORMER_KEYS.from_jax(ours).items()}
    model.load_state_dict(tensors, strict=True)
    back = TRANSFORMER_KEYS.to_jax(random_flux.state_dict(model), random_flux.shapes(CONFIG))
    jax.tree.map(np.testing.assert_array_equal, back, ours)


def test_half_precision_is_kept():
    ours = _random(random_flux.shapes(CONFIG), ml_dtypes.bfloat16)
    theirs = TRANSFORMER_KEYS.from_jax(ours)
    assert {array.dtype for array in theirs.values()} == {np.dtype(ml_dtypes.bfloat16)}
    back = TRANSFORMER_KEYS.to_jax(theirs, random_flux.shapes(CONFIG))
    jax.tree.map(np.testing.assert_array_equal, back, ours)


def test_layers_are_stacked_in_order(theirs):
    ours = TRANSFORMER_KEYS.to_jax(theirs, random_flux.shapes(CONFIG))
    for layer in range(CONFIG.num_single_layers):
        np.testing.assert_array_equal(
            ours["single_blocks"]["out"]["kernel"][layer],
            theirs[f"single_transformer_blocks.{layer}.proj_out.weight"].T,
        )


def test_the_interval_embedder_is_t2i_distills_second_time_embedder(theirs):
    ours = _random(random_flux.shapes(WITH_INTERVAL))
    exported = TRANSFORMER_KEYS.from_jax(ours)
    added = {name: exported[name].shape for name in exported.keys() - theirs.keys()}
    assert added == INTERVAL_SHAPES
    back = TRANSFORMER_KEYS.to_jax(exported, random_flux.shapes(WITH_INTERVAL))
    jax.tree.map(np.testing.assert_array_equal, back, ours)


def test_a_missing_tensor_is_named(theirs):
    name = "transformer_blocks.1.attn.norm_added_q.weight"
    rest = {key: array for key, array in theirs.items() if key != name}
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        TRANSFORMER_KEYS.to_jax(rest, random_flux.shapes(CONFIG))
    with pytest.raises(ValueError, match="'timestep_embedder2.linear_1.bias' is missing"):
        TRANSFORMER_KEYS.to_jax(theirs, random_flux.shapes(WITH_INTERVAL))


def test_an_unexpected_tensor_is_named(theirs):
    with pytest.raises(ValueError, match="'logvar_linear.weight' is not expected"):
        extra = theirs | {"logvar_linear.weight": np.zeros((1, 16))}
        TRANSFORMER_KEYS.to_jax(extra, random_flux.shapes(CONFIG))
    with pytest.raises(ValueError, match="'time_text_embed.guidance_embedder.* is not expected"):
        TRANSFORMER_KEYS.to_jax(theirs, random_flux.shapes(WITHOUT_GUIDANCE))
    with pytest.raises(ValueError, match="'single_transformer_blocks.2.* is not expected"):
        shallower = dataclasses.replace(CONFIG, num_single_layers=2)
        TRANSFORMER_KEYS.to_jax(theirs, random_flux.shapes(shallower))


def test_a_tensor_of_another_shape_is_named(theirs):
    wider = dataclasses.replace(CONFIG, joint_attention_dim=11)
    with pytest.raises(ValueError, match=r"'context_embedder.weight' has shape \(16, 10\)"):
        TRANSFORMER_KEYS.to_jax(theirs, random_flux.shapes(wider))
