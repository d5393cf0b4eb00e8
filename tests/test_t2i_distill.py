"""A network of T2I-Distill gives the velocities that its own formulas do, and comes back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_files
import random_flux
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from random_files import NETWORK

from jax_distill import config
from jax_distill.assembly import build
from jax_distill.flow import Text
from jax_distill.interop import ported_folder
from jax_distill.models import mmdit
from jax_distill.runs.exporting import export
from jax_distill.runs.porting import port

GRID = (3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_files.save_base(tmp_path_factory.mktemp("base"))


def _inputs():
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 12, 16), "sequence": (2, 5, 24), "pooled": (2, 16)}
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    t, s, w = np.float32([[0.83, 0.31], [0.4, 0.05], [4.5, 1.0]])
    return inputs | {"t": t, "interval": t - s, "guidance": w}


def _embedding(state, prefix, values):
    """T2I-Distill's embedder: diffusers' sinusoids of the values as they are, and two layers."""
    features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(values)
    embedder = TimestepEmbedding(256, NETWORK.hidden_size)
    names = [name for name in state if name.startswith(prefix)]
    embedder.load_state_dict({name.removeprefix(prefix): state[name] for name in names})
    return embedder(features)


def _theirs(state, inputs, interval):
    """The velocity of diffusers' transformer, modulated by T2I-Distill's embedding."""
    model = random_flux.reference(NETWORK)
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    embedding = model.time_text_embed.text_embedder(given["pooled"])
    embedding += _embedding(state, "time_text_embed.timestep_embedder.", given["t"])
    embedding += _embedding(state, "time_text_embed.guidance_embedder.", given["guidance"])
    if interval:
        embedding += _embedding(state, "timestep_embedder2.", given["interval"])
    model.time_text_embed.forward = lambda *_: embedding
    return _velocity(model, given, 1.0)


def _stock(inputs):
    """That of diffusers' own transformer, which multiplies by 1000, at t / 1000 and w / 1000."""
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return _velocity(random_flux.reference(NETWORK), given, 1000.0)


@torch.no_grad()
def _velocity(model, given, divisor):
    ids = torch.zeros(*GRID, 3)
    ids[..., 1], ids[..., 2] = torch.meshgrid(*map(torch.arange, GRID), indexing="ij")
    return model(
        hidden_states=given["x"],
        encoder_hidden_states=given["sequence"],
        pooled_projections=given["pooled"],
        timestep=given["t"] / divisor,
        guidance=given["guidance"] / divisor,
        img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(5, 3),
    ).sample.numpy()


@pytest.mark.parametrize("interval", [False, True])
def test_the_velocity_is_that_of_its_own_formulas(folder, tmp_path, interval):
    state = random_files.state_dict(interval=interval)
    torch.save({"module": state}, tmp_path / "student.pt")
    port(tmp_path / "student.pt", tmp_path / "ported", base=str(folder))
    settings = config.load(tmp_path / "ported")
    network = build.network_config(settings)
    like = jax.eval_shape(lambda: build.initial_parameters(settings))
    params = ported_folder.load_part(tmp_path / "ported", "network", like)
    velocity = jax.jit(mmdit.as_network(network, grid=GRID).velocity)

    inputs = _inputs()
    text = Text(jnp.asarray(inputs["sequence"]), jnp.asarray(inputs["pooled"]))
    more = (inputs["interval"],) if interval else ()
    ours = np.asarray(velocity(params, inputs["x"], inputs["t"], text, inputs["guidance"], *more))
    theirs = _theirs(state, inputs, interval)

    def error(expected):
        return np.linalg.norm(ours - expected) / np.linalg.norm(expected)

    print(f"interval {interval}: relative error {error(theirs):.1e}")
    assert error(theirs) <= 1e-6
    if not interval:
        assert error(_stock(inputs)) <= 1e-6
    stock = dataclasses.replace(network, time_scale=1000.0, guidance_factor=1000.0)
    embeddings = [
        mmdit.scalar_embedding(params["guidance_embedder"], values.guidance_factor * jnp.ones(1))
        for values in (network, stock)
    ]
    assert np.abs(np.subtract(*embeddings)).max() > 0.1  # the factors matter


@pytest.mark.parametrize("interval", [False, True])
def test_its_file_comes_back_bit_for_bit(folder, tmp_path, interval):
    state = random_files.state_dict(interval=interval)
    torch.save({"module": state}, tmp_path / "student.pt")
    port(tmp_path / "student.pt", tmp_path / "ported", base=str(folder))
    export(str(tmp_path / "ported"), tmp_path / "exported", layout="t2i_distill")
    port(tmp_path / "exported/model.pt", tmp_path / "again", base=str(folder))
    random_files.assert_same_tensors(tmp_path / "again", random_files.arrays(state))
    first, second = (config.load(tmp_path / name) for name in ("ported", "again"))
    assert first == second and random_files.factors(tmp_path / "again") == (1.0, 1.0)
