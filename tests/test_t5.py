"""The T5 encoder is that of transformers, on the same weights, and survives short types."""

import copy
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
from transformers.models.t5.modeling_t5 import T5Attention

from jax_distill.devices.sharding import AXES, parameter_spec
from jax_distill.models import t5
from jax_distill.models.t5 import T5Config

SMALL = T5Config(
    vocab_size=40,
    d_model=24,
    d_kv=8,
    d_ff=40,
    num_layers=2,
    num_heads=3,
)
# Heads that are together wider than the stream, as none of T5's own; few and near buckets.
WIDE_HEADS = T5Config(
    vocab_size=33,
    d_model=16,
    d_kv=12,
    d_ff=20,
    num_layers=3,
    num_heads=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
)
ONE_LAYER = T5Config(
    vocab_size=50,
    d_model=32,
    d_kv=4,
    d_ff=96,
    num_layers=1,
    num_heads=4,
    relative_attention_num_buckets=14,
    relative_attention_max_distance=30,
    layer_norm_epsilon=1e-3,
)
DEEP = dataclasses.replace(SMALL, num_layers=6)


@functools.cache
def encoder(config, dtype="float32"):
    return jax.jit(t5.as_encoder(config, dtype=dtype))


def token_ids(config, length, batch=2, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


def of_transformers(model, ids, mask=None):
    mask = None if mask is None else torch.from_numpy(mask)
    return model(torch.from_numpy(ids), mask).last_hidden_state.float().numpy()


@pytest.mark.parametrize(
    ("config", "length"),
    [(SMALL, 1), (SMALL, 300), (WIDE_HEADS, 7), (WIDE_HEADS, 64), (ONE_LAYER, 33), (DEEP, 20)],
)
def test_features_are_those_of_transformers(config, length):
    model, ids = random_text.t5_reference(config), token_ids(config, length)
    ours = encoder(config)(random_text.ported(config, model), ids)
    assert ours.shape == (2, length, config.d_model)
    assert relative_error(ours, of_transformers(model, ids)) <= 1e-5


@pytest.mark.parametrize("config", [SMALL, WIDE_HEADS])
def test_a_mask_hides_padding(config):
    model, ids = random_text.t5_reference(config), token_ids(config, 20)
    mask = np.arange(20) < np.array([[20], [6]])
    params = random_text.ported(config, model)
    ours = encoder(config)(params, ids, mask)
    assert relative_error(ours, of_transformers(model, ids, mask.astype(int))) <= 1e-5
    # The first six tokens do not know of the rest; without a mask they do.
    alone = encoder(config)(params, ids[:, :6])
    assert relative_error(ours[1, :6], alone[1]) <= 1e-5
    assert relative_error(encoder(config)(params, ids)[1, :6], alone[1]) >= 0.05
    np.testing.assert_array_equal(
        encoder(config)(params, ids, np.ones_like(mask)), encoder(config)(params, ids)
    )


@pytest.mark.parametrize(
    ("buckets", "max_distance"), [(32, 128), (8, 20), (14, 30), (4, 2), (12, 50), (64, 300)]
)
def test_buckets_are_those_of_transformers(buckets, max_distance):
    config = dataclasses.replace(
        SMALL,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
    )
    length = 600
    relative = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    theirs = T5Attention._relative_position_bucket(relative, True, buckets, max_distance)
    np.testing.assert_array_equal(t5.relative_buckets(config, length), theirs.numpy())


@pytest.fixture(scope="module")
def outgrown():
    """Weights that drive one channel past float16's largest number, and their float32 features.

    As in T5-XXL: the first blocks write a huge value into a channel of the stream, and the norms
    that follow shrink it and blow up the rest.
    """
    model = random_text.t5_reference(DEEP)
    model.shared.weight[:, 1] = 8.0  # a channel that all tokens share, to drive the other one
    first, *rest = model.encoder.block
    mlp = first.layer[1].DenseReluDense
    for row, value in ((mlp.wi_0.weight[0], 4.0), (mlp.wi_1.weight[0], 10.0)):
        row[:], row[1] = 0.0, value
    mlp.wo.weight[0, 0] = 4e3
    for layer in [layer for block in rest for layer in block.layer]:
        layer.layer_norm.weight *= 3e4
        layer.layer_norm.weight[0] = 1.0
    model.encoder.final_layer_norm.weight *= 3e4
    model.encoder.final_layer_norm.weight[0] = 1.0
    limit = torch.finfo(torch.float16).max
    assert max(parameter.abs().max() for parameter in model.parameters()) < limit
    ids = token_ids(DEEP, 12)
    stream = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    assert stream[0].abs().max() < 10 and stream[2].abs().max() > 10 * limit
    return model, ids, of_transformers(model, ids)


def rms_error(actual, expected):
    error = np.asarray(actual) - np.asarray(expected)
    return np.sqrt(np.mean(np.square(error)) / np.mean(np.square(expected)))


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-3), ("bfloat16", 1e-2)])
def test_what_outgrows_float16_stays_exact(outgrown, dtype, bound):
    model, ids, expected = outgrown
    ours = encoder(DEEP, dtype)(random_text.ported(DEEP, model), ids)
    assert ours.dtype == jnp.float32
    error = rms_error(ours, expected)
    assert 1e-5 < error < bound, error
    # All in one type, it is worse than that or no number at all.
    theirs = copy.deepcopy(model).to(getattr(torch, dtype))
    assert not rms_error(of_transformers(theirs, ids), expected) < 2 * error


def test_bfloat16_parameters_are_the_same_as_rounded_ones():
    model, ids = random_text.t5_reference(SMALL), token_ids(SMALL, 9)
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_text.ported(SMALL, model))
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), short)
    ours = encoder(SMALL)(short, ids)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, encoder(SMALL)(rounded, ids), rtol=1e-6, atol=1e-6)


def test_fresh_features_have_unit_variance_and_float64_is_kept():
    with jax.enable_x64(True):
        params = jax.jit(lambda: t5.initial_parameters(SMALL, nnx.Rngs(0), jnp.float64))()
        ours = encoder(SMALL, "float64")(params, token_ids(SMALL, 5))
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(np.square(ours).mean(-1), 1, atol=1e-5)
        assert np.std(ours, axis=(0, 1)).min() > 0.1


def test_every_matrix_is_sharded_and_every_vector_whole():
    mesh = AbstractMesh((1, 4, 2), AXES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(random_text.shapes(SMALL)):
        name = "/".join(key.key for key in path)
        spec = tuple(parameter_spec(name, leaf.shape, mesh))
        inward = ("query", "key", "value", "mlp_gate", "mlp_in")
        if name == "token_embedding":
            assert spec == (None, "fsdp")
        elif name.endswith("kernel"):
            axes = ("fsdp", "tensor") if path[-2].key in inward else ("tensor", "fsdp")
            assert spec == (None, *axes), name
        else:
            assert spec == (None,) * leaf.ndim, name


def test_ids_beyond_the_vocabulary_are_not_read_as_others():
    params = random_text.ported(SMALL, random_text.t5_reference(SMALL))
    assert np.isnan(encoder(SMALL)(params, np.full((1, 3), SMALL.vocab_size))).all()


def test_a_mask_of_another_shape_is_refused():
    ids = jax.ShapeDtypeStruct((2, 5), np.int32)
    mask = jax.ShapeDtypeStruct((2, 6), np.int32)
    with pytest.raises(ValueError, match=r"mask: shape \(2, 6\) is not that of the ids, \(2, 5\)"):
        jax.eval_shape(t5.as_encoder(SMALL), random_text.shapes(SMALL), ids, mask)


def test_transformers_reads_our_config_and_we_read_theirs():
    theirs = transformers.T5Config.from_dict(WIDE_HEADS.to_dict())
    assert T5Config.from_dict(theirs.to_dict()) == WIDE_HEADS
    assert theirs.is_gated_act and theirs.dense_act_fn == "gelu_new"
    old = WIDE_HEADS.to_dict()
    del old["relative_attention_max_distance"]
    default = dataclasses.replace(WIDE_HEADS, relative_attention_max_distance=128)
    assert T5Config.from_dict(old) == default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu' is not supported"),
        ({"model_type": "umt5"}, "model_type='umt5' is not supported"),
        ({"num_heads": 0}, "num_heads: 0 is not an integer of at least 1"),
        ({"d_ff": 2.5}, "d_ff: 2.5 is not an integer"),
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets: 7 is not an even"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance: 8 must be more"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        T5Config.from_dict(SMALL.to_dict() | changes)


def test_a_missing_size_is_named():
    values = SMALL.to_dict()
    del values["d_kv"]
    with pytest.raises(ValueError, match="T5 config: 'd_kv' is missing"):
        T5Config.from_dict(values)
