"""The autoencoder computes what diffusers' AutoencoderKL does, on the same weights."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from flax import nnx

from jax_distill.interop.keys.autoencoder import AUTOENCODER_KEYS
from jax_distill.models.autoencoder import Autoencoder, AutoencoderConfig, GroupNorm, pack, unpack

CONFIGS = {
    "four_levels": AutoencoderConfig(3, 16, (8, 16, 24, 32), 1, 8),
    "two_layers": AutoencoderConfig(3, 4, (12, 24), 2, 6, 0.5, -0.25),
    "narrowing": AutoencoderConfig(1, 3, (16, 8), 1, 4),
}


def _abstract(config, dtype=jnp.float32):
    return nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0), dtype=dtype))


def _shapes(config):
    return nnx.to_pure_dict(nnx.state(_abstract(config)))


def _reference(config):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL.from_config(config.to_dict()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from their initial constants
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _ported(config, reference, dtype=jnp.float32):
    state_dict = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    graph, state = nnx.split(_abstract(config, dtype))
    nnx.replace_by_pure_dict(state, AUTOENCODER_KEYS.to_jax(state_dict, nnx.to_pure_dict(state)))
    return nnx.merge(graph, state)


def _run(method, model, x):
    graph, state = nnx.split(model)
    # Compiling dominates these tests: spend no time on optimisation.
    run = jax.jit(lambda state, x: method(nnx.merge(graph, state), x))
    return run(state, x)


def _assert_close(ours, theirs):
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error <= 1e-5, error


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request):
    config = CONFIGS[request.param]
    reference = _reference(config)
    return config, reference, _ported(config, reference)


def test_encode_parity(pair):
    config, reference, ours = pair
    x = np.random.default_rng(1).uniform(-1, 1, (2, 16, 24, config.in_channels)).astype("f4")
    posterior = _run(Autoencoder.encode, ours, x)
    with torch.no_grad():
        theirs = reference.encode(torch.tensor(x).permute(0, 3, 1, 2)).latent_dist
    _assert_close(posterior.mean, theirs.mean)
    _assert_close(posterior.logvar, theirs.logvar)


def test_decode_parity(pair):
    config, reference, ours = pair
    z = np.random.default_rng(2).standard_normal((2, 4, 6, config.latent_channels)).astype("f4")
    images = _run(Autoencoder.decode, ours, z)
    with torch.no_grad():
        theirs = reference.decode(torch.tensor(z).permute(0, 3, 1, 2)).sample
    _assert_close(images, theirs)


def test_keys_round_trip_is_exact(pair):
    config, reference, _ = pair
    theirs = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    back = AUTOENCODER_KEYS.from_jax(AUTOENCODER_KEYS.to_jax(theirs, _shapes(config)))
    assert back.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array)


def test_flux_has_the_reference_tensors():
    with torch.device("meta"):
        reference = diffusers.AutoencoderKL.from_config(AutoencoderConfig().to_dict())
    theirs = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert AUTOENCODER_KEYS.shapes(_shapes(AutoencoderConfig())) == theirs
    assert sum(np.prod(shape) for shape in theirs.values()) == 83_819_683  # published FLUX.1 VAE


def test_logvar_is_clipped_as_in_the_reference():
    config = CONFIGS["narrowing"]
    reference = _reference(config)
    with torch.no_grad():
        reference.encoder.conv_out.bias[config.latent_channels :] = torch.tensor([-1e3, 0, 1e3])
    model = _ported(config, reference)
    logvar = _run(Autoencoder.encode, model, jnp.zeros((1, 4, 4, 1))).logvar
    assert (logvar[..., 0] == -30).all() and (logvar[..., 2] == 20).all()
    assert (jnp.abs(logvar[..., 1]) < 20).all()


def test_config_round_trip_with_the_reference(pair):
    config, reference, _ = pair
    assert AutoencoderConfig.from_dict(dict(reference.config)) == config
    assert AutoencoderConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_quant_conv": True}, "use_quant_conv=True is not supported"),
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported"),
        ({"norm_num_groups": 48}, "128 is not a multiple of norm_num_groups=48"),
    ],
)
def test_config_of_another_network_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig.from_dict(AutoencoderConfig().to_dict() | change)


def test_config_without_a_size_is_refused():
    values = AutoencoderConfig().to_dict()
    del values["scaling_factor"]
    with pytest.raises(ValueError, match="'scaling_factor' is missing"):
        AutoencoderConfig.from_dict(values)


def test_no_shift_is_a_shift_of_zero():
    values = AutoencoderConfig().to_dict() | {"shift_factor": None}
    assert AutoencoderConfig.from_dict(values).shift_factor == 0.0


def test_picture_size_must_be_a_multiple():
    model = _abstract(CONFIGS["narrowing"])
    with pytest.raises(ValueError, match=r"\(4, 5\) are not multiples of 2"):
        model.encode(jnp.zeros((1, 4, 5, 1)))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])  # at 1e-3 epsilon halves the result
def test_group_norm_parity(size):
    norm = GroupNorm(8, 2, rngs=nnx.Rngs(0), dtype=jnp.float32)
    norm.scale[...], norm.bias[...] = jnp.arange(8) / 4, jnp.arange(8) / 8 - 1
    x = size * np.random.default_rng(5).standard_normal((2, 4, 4, 8)).astype("f4")
    torch_norm = torch.nn.GroupNorm(2, 8, eps=1e-6)
    torch_norm.load_state_dict({"weight": torch.arange(8) / 4, "bias": torch.arange(8) / 8 - 1})
    with torch.no_grad():
        _assert_close(
            _run(GroupNorm.__call__, norm, x), torch_norm(torch.tensor(x).permute(0, 3, 1, 2))
        )


def test_group_norm_keeps_its_precision_far_from_zero():
    norm = GroupNorm(8, 2, rngs=nnx.Rngs(0), dtype=jnp.float32)
    x = np.random.default_rng(6).standard_normal((2, 4, 4, 8)).astype("f4")
    near, far = (_run(GroupNorm.__call__, norm, x + shift) for shift in (0.0, 1000.0))
    np.testing.assert_allclose(far, near, atol=5e-4)  # float32 rounds x + 1000 to 6e-5


def test_normalize_is_what_flux_does():
    model = _abstract(CONFIGS["two_layers"])
    z = jnp.linspace(-3.0, 3.0, 7)
    np.testing.assert_allclose(model.normalize(z), (z + 0.25) * 0.5, rtol=1e-6)
    np.testing.assert_allclose(model.denormalize(model.normalize(z)), z, atol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters():
    config = CONFIGS["narrowing"]
    reference = _reference(config)
    model = _ported(config, reference, jnp.bfloat16)
    abstract = jax.tree.leaves(nnx.state(_abstract(config, jnp.bfloat16)))
    assert {leaf.dtype for leaf in abstract} == {jnp.dtype("float32")}
    z = np.random.default_rng(4).standard_normal((1, 2, 2, 3)).astype("f4")
    images = _run(Autoencoder.decode, model, z)
    with torch.no_grad():
        theirs = reference.decode(torch.tensor(z).permute(0, 3, 1, 2)).sample
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert images.dtype == jnp.bfloat16
    assert np.abs(images.astype("f4") - theirs).max() < 0.05 * np.abs(theirs).max()


@pytest.mark.parametrize(("height", "width"), [(4, 6), (2, 2), (8, 4)])
def test_pack_is_flux_packing(height, width):
    z = np.random.default_rng(3).standard_normal((2, height, width, 5)).astype("f4")
    channels_first = torch.tensor(z).permute(0, 3, 1, 2).contiguous()
    tokens = FluxPipeline._pack_latents(channels_first, 2, 5, height, width)
    np.testing.assert_array_equal(pack(jnp.asarray(z)), tokens.numpy())
    theirs = FluxPipeline._unpack_latents(tokens, 8 * height, 8 * width, 8).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(unpack(jnp.asarray(tokens.numpy()), height, width), theirs)
    np.testing.assert_array_equal(unpack(pack(jnp.asarray(z)), height, width), z)


def test_pack_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match=r"\(3, 4\) must be even"):
        pack(jnp.zeros((1, 3, 4, 2)))
    for shape, height, width in (((1, 4, 8), 3, 4), ((1, 5, 8), 4, 4), ((1, 4, 6), 4, 4)):
        with pytest.raises(ValueError, match="does not unpack"):
            unpack(jnp.zeros(shape), height, width)
