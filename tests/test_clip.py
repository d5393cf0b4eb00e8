"""CLIP's text model is that of transformers, on the same weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_text
import torch
import transformers
from flax import nnx
from jax.sharding import AbstractMesh
from random_text import relative_error

from jax_distill.devices.sharding import AXES, parameter_spec
from jax_distill.models import clip
from jax_distill.models.clip import ClipConfig

LEGACY = ClipConfig(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=77,
)
FIRST_EOS = ClipConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=16,
    hidden_act="gelu",
    eos_token_id=41,
)
ONE_LAYER = dataclasses.replace(
    FIRST_EOS, num_hidden_layers=1, num_attention_heads=8, layer_norm_eps=1e-3, eos_token_id=0
)


@functools.cache
def encoder(config, dtype="float32"):
    return jax.jit(clip.as_encoder(config, dtype=dtype))


def token_ids(config, length):
    """Random ids; none, one and several end tokens (or highest ids, all of one id and not)."""
    ids = np.random.default_rng(length).integers(3, config.vocab_size - 12, (5, length))
    end = config.vocab_size - 1 if config is LEGACY else config.eos_token_id
    ids[1, length // 2] = end
    ids[2, length // 2 :] = end
    ids[3, [0, -1]] = end
    ids[4, :] = 7
    return ids


def of_transformers(model, ids):
    output = model(torch.from_numpy(ids))
    return output.last_hidden_state.float().numpy(), output.pooler_output.float().numpy()


@pytest.mark.parametrize(
    ("config", "length"),
    [(LEGACY, 77), (LEGACY, 9), (FIRST_EOS, 16), (FIRST_EOS, 5), (ONE_LAYER, 12)],
)
def test_features_are_those_of_transformers(config, length):
    model, ids = random_text.clip_reference(config), token_ids(config, length)
    ours = encoder(config)(random_text.ported(config, model), ids)
    sequence, pooled = of_transformers(model, ids)
    assert ours.sequence.shape == (5, length, config.hidden_size)
    assert relative_error(ours.sequence, sequence) <= 1e-5
    assert relative_error(ours.pooled, pooled) <= 1e-5


def test_the_end_of_the_text_is_the_highest_id_or_the_first_end_token():
    """The same weights and ids, read by either rule: the places that they name."""
    end = 41
    ids = np.array([[3, end, 9, end, 5], [3, 44, 9, end, 5], [3, 44, 9, 44, 5]])
    legacy = dataclasses.replace(FIRST_EOS, eos_token_id=clip.LEGACY_EOS)
    params = random_text.ported(FIRST_EOS, random_text.clip_reference(FIRST_EOS))
    for config, places in ((FIRST_EOS, [1, 3, 0]), (legacy, [1, 1, 1])):
        ours = encoder(config)(params, ids)
        np.testing.assert_array_equal(ours.pooled, ours.sequence[np.arange(3), places])


def test_a_token_sees_those_before_it_only():
    params = random_text.ported(FIRST_EOS, random_text.clip_reference(FIRST_EOS))
    ids = token_ids(FIRST_EOS, 16)
    changed = ids.copy()
    changed[:, 10] = (ids[:, 10] + 1) % FIRST_EOS.vocab_size
    before, after = (encoder(FIRST_EOS)(params, i).sequence for i in (ids, changed))
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert np.abs(before - after)[:, 10:].max(-1).min() > 1e-3


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 3e-3), ("bfloat16", 2e-2)])
def test_short_types(dtype, bound):
    """Near float32, with and without a stream that has outgrown float16."""
    model, ids = random_text.clip_reference(FIRST_EOS), token_ids(FIRST_EOS, 16)
    for scale in (1.0, 3e4):
        # What the first block adds grows; all that follows normalises it.
        model.encoder.layers[0].mlp.fc2.weight *= scale
        expected = of_transformers(model, ids)
        ours = encoder(FIRST_EOS, dtype)(random_text.ported(FIRST_EOS, model), ids)
        for one, other in zip(ours, expected):
            assert one.dtype == jnp.float32
            error = np.sqrt(np.mean(np.square(one - other)) / np.mean(np.square(other)))
            assert 1e-5 < error < bound, error
    stream = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states[1]
    assert stream.abs().max() > torch.finfo(torch.float16).max


def test_fresh_features_have_unit_variance_and_float64_is_kept():
    with jax.enable_x64(True):
        params = jax.jit(lambda: clip.initial_parameters(LEGACY, nnx.Rngs(0), jnp.float64))()
        ours = encoder(LEGACY, "float64")(params, token_ids(LEGACY, 9))
        assert ours.sequence.dtype == ours.pooled.dtype == jnp.float64
        np.testing.assert_allclose(np.square(ours.sequence).mean(-1), 1, atol=1e-4)
        assert np.std(ours.pooled, axis=0).min() > 0.01


def test_every_matrix_is_sharded_and_every_vector_whole():
    mesh = AbstractMesh((1, 4, 2), AXES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(random_text.shapes(LEGACY)):
        name = "/".join(key.key for key in path)
        spec = tuple(parameter_spec(name, leaf.shape, mesh))
        if name == "token_embedding":
            assert spec == (None, "fsdp")
        elif name.endswith("kernel"):
            inward = path[-2].key in ("query", "key", "value", "mlp_in")
            axes = ("fsdp", "tensor") if inward else ("tensor", "fsdp")
            assert spec == (None, *axes), name
        else:
            assert spec == (None,) * leaf.ndim, name


def test_more_tokens_than_positions_are_refused():
    ids = jax.ShapeDtypeStruct((2, 17), np.int32)
    with pytest.raises(ValueError, match="ids: 17 tokens are more than max_position_embeddings=16"):
        jax.eval_shape(clip.as_encoder(FIRST_EOS), random_text.shapes(FIRST_EOS), ids)


def test_ids_beyond_the_vocabulary_are_not_read_as_others():
    params = random_text.ported(FIRST_EOS, random_text.clip_reference(FIRST_EOS))
    features = encoder(FIRST_EOS)(params, np.full((1, 3), FIRST_EOS.vocab_size))
    assert np.isnan(features.sequence).all()


@pytest.mark.parametrize("config", [LEGACY, FIRST_EOS])
def test_transformers_reads_our_config_and_we_read_theirs(config):
    theirs = transformers.CLIPTextConfig.from_dict(config.to_dict())
    assert ClipConfig.from_dict(theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act: 'silu' is not one of quick_gelu, gelu"),
        ({"model_type": "clip"}, "model_type='clip' is not supported"),
        ({"num_attention_heads": 5}, "num_attention_heads: 5 does not divide hidden_size=24"),
        ({"vocab_size": 0}, "vocab_size: 0 is not an integer of at least 1"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id: \[2, 3\] is not an integer of at least 0"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ClipConfig.from_dict(LEGACY.to_dict() | changes)


def test_a_missing_size_is_named_and_what_old_configs_lack_is_known():
    values = LEGACY.to_dict()
    del values["eos_token_id"]
    assert ClipConfig.from_dict(values).eos_token_id == transformers.CLIPTextConfig().eos_token_id
    del values["intermediate_size"]
    with pytest.raises(ValueError, match="CLIP config: 'intermediate_size' is missing"):
        ClipConfig.from_dict(values)
