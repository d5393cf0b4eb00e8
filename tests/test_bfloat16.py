"""Time survives bfloat16: a rescaled network loses no more to it than its teacher does.

At FLUX's width, one block deep (slow tests), and at a small width. The time embedder is the bundled
teacher's, its 192 channels mixed into as many as the network has.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

from jax_distill import flow
from jax_distill.assembly import frozen
from jax_distill.config import base
from jax_distill.flow import Text
from jax_distill.interop import time_scale
from jax_distill.interop.cards import model_card
from jax_distill.models import mmdit
from jax_distill.models.mmdit import TIME_FREQUENCIES
from jax_distill.objectives.embedder_fit import fit_quality
from jax_distill.objectives.time_rescale import refit_time_embedder
from jax_distill.worlds.shapes import bundled

SMALL = mmdit.MMDiTConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=32,
    num_attention_heads=6,
    axes_dims_rope=(8, 12, 12),
    joint_attention_dim=24,
    pooled_projection_dim=12,
    guidance_embeds=True,
)
FLUX = dataclasses.replace(
    SMALL, num_layers=0, attention_head_dim=128, num_attention_heads=24, axes_dims_rope=(16, 56, 56)
)


def mixed_embedder(width: int) -> dict:
    """The bundled teacher's time embedder, its output mixed into `width` channels."""
    params, _ = bundled.load("teacher")
    first, second = (params["time_embedder"][f"linear_{i}"] for i in (1, 2))
    old = second["bias"].shape[0]
    mix = np.random.default_rng(0).standard_normal((old, width)) / np.sqrt(old)
    pad = width - old
    return {
        "linear_1": {
            "kernel": jnp.pad(first["kernel"], ((0, 0), (0, pad))),
            "bias": jnp.pad(first["bias"], (0, pad)),
        },
        "linear_2": {
            "kernel": jnp.pad(jnp.float32(second["kernel"] @ mix), ((0, pad), (0, 0))),
            "bias": jnp.float32(second["bias"] @ mix),
        },
    }


def random_teacher(config, seed: int = 0) -> dict:
    """All weights random, but those of the time embedder."""
    shapes = jax.eval_shape(lambda: mmdit.initial_parameters(config, mmdit.nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def draw(key, leaf):
        scale = 1.0 if leaf.ndim < 2 else max(leaf.shape[-2], 1) ** -0.5
        return 0.5 * scale * jax.random.normal(key, leaf.shape)

    teacher = jax.tree.unflatten(structure, [draw(*pair) for pair in zip(keys, leaves)])
    return {**teacher, "time_embedder": mixed_embedder(config.hidden_size)}


@pytest.fixture(
    scope="module",
    params=[pytest.param(SMALL, id="192"), pytest.param(FLUX, id="3072", marks=pytest.mark.slow)],
)
def pair(request):
    """A teacher of 1000 t, and what the refit makes of it."""
    config = request.param
    teacher = random_teacher(config)
    rescaled = dataclasses.replace(config, time_scale=1.0)
    network = {**teacher, "time_embedder": refit(config, teacher["time_embedder"])}
    yield (config, teacher), (rescaled, network)
    jax.clear_caches()


def refit(config, embedder):
    return refit_time_embedder(
        lambda t: mmdit.time_embedding(config, embedder, jnp.asarray(t)), config.hidden_size
    )


@functools.cache
def with_derivative(config, dtype):
    """A function that gives velocity and its derivative by time at 16 times, each (16, 16, C)."""
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (16, 16, config.in_channels))
    text = Text(
        jax.random.normal(keys[1], (16, 4, config.joint_attention_dim)),
        jax.random.normal(keys[2], (16, config.pooled_projection_dim)),
    )
    network = mmdit.as_network(config, dtype=dtype)

    @jax.jit
    def evaluate(params, t):
        def velocity(t):
            return network.velocity(params, x, t, text, jnp.full(16, 4.5))

        return jax.jvp(velocity, (t,), (jnp.ones_like(t),))

    return lambda params: evaluate(params, jnp.linspace(0.03, 0.97, 16))


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def losses(config, params) -> np.ndarray:
    """What bfloat16 costs, relative: of the velocity, and of its derivative."""
    exact = with_derivative(config, "float32")(params)
    rounded = with_derivative(config, "bfloat16")(frozen.narrowed(params, "bfloat16"))
    return np.array([rms(r - e) / rms(e) for r, e in zip(rounded, exact)])


def test_a_rescaled_student_loses_no_more_than_its_teacher(pair):
    """Relative losses differ by a third from one small random network to another: take several."""
    (config, teacher), (rescaled, network) = pair
    teachers = [losses(config, teacher)]
    students = [losses(rescaled, network)]
    for seed in range(1, 6 if config is SMALL else 4):
        other = random_teacher(config, seed)
        teachers.append(losses(config, other))
        other["time_embedder"] = network["time_embedder"]
        students.append(losses(rescaled, other))
    teacher, student = np.mean(teachers, axis=0), np.mean(students, axis=0)
    print("velocity, d/dt lost to bfloat16: teacher", teacher, "student", student)
    assert (student <= 1.2 * teacher).all()
    assert (teacher < 0.02).all()


def test_the_refit_survives_rounding(pair):
    (config, teacher), (rescaled, network) = pair
    old, new = teacher["time_embedder"], network["time_embedder"]

    def quality(embedder):
        return fit_quality(
            lambda t: mmdit.time_embedding(config, old, jnp.asarray(t)),
            lambda t: mmdit.time_embedding(rescaled, embedder, jnp.asarray(t)),
            embedder,
        )

    exact = quality(new)
    assert exact.error <= 0.07 and exact.condition < 20
    held = quality(frozen.narrowed(network, "bfloat16")["time_embedder"])
    assert held.error <= 1.1 * exact.error  # as networks in bfloat16 hold and evaluate it
    # And where another program stores it in bfloat16. A narrow embedder's ramps are few, so that
    # each one's place counts.
    rounded = quality(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), new))
    print("error over variation", exact, "parameters in bfloat16", rounded.error)
    assert rounded.error <= (1.1 if config.hidden_size > 1000 else 1.4) * exact.error


@torch.no_grad()
def test_the_card_says_what_stock_pipelines_lose_in_bfloat16(pair):
    """Of the embedder that is exported for them, evaluated by diffusers' own modules."""
    _, (config, network) = pair
    if config.hidden_size < 1000:
        pytest.skip("the card speaks of FLUX's width")
    exported = time_scale.refit(network["time_embedder"], 1.0, 1000.0).embedder
    t = np.float32((np.arange(500) + 0.5) / 500)
    own = np.asarray(mmdit.scalar_embedding(network["time_embedder"], jnp.asarray(t)))
    stock = TimestepEmbedding(TIME_FREQUENCIES, config.hidden_size)
    for name, layer in exported.items():
        getattr(stock, name).weight.copy_(torch.from_numpy(np.array(layer["kernel"].T)))
        getattr(stock, name).bias.copy_(torch.from_numpy(np.array(layer["bias"])))
    rounded = (torch.from_numpy(t).bfloat16() * 1000).float()

    def lost(times, dtype):
        features = Timesteps(TIME_FREQUENCIES, True, 0)(times).to(dtype)
        return rms(stock.to(dtype)(features).float().numpy() - own) / rms(own - own.mean(0))

    exact = lost(torch.from_numpy(t) * 1000, torch.float32)
    kept, narrowed = lost(rounded, torch.float32), lost(rounded, torch.bfloat16)
    print(f"lost: float32 {exact:.1e}, t in bfloat16 {kept:.4f}, all in bfloat16 {narrowed:.4f}")
    assert exact < 1e-4
    assert kept == pytest.approx(model_card.LOST_IN_FLOAT32, rel=0.1)
    assert narrowed == pytest.approx(model_card.LOST_IN_BFLOAT16, rel=0.1)


def test_everything_that_carries_time_is_float32_up_to_the_blocks(pair):
    """Embeddings and their tangents, of a network that computes in bfloat16, are float32's own."""
    config, params = pair[0]
    if config is FLUX:
        pytest.skip("the types are the same at any width")
    config = dataclasses.replace(config, interval_embeds=True)
    params = {**params, "interval_embedder": params["guidance_embedder"]}
    text = Text(jnp.ones((2, 4, 24)), jnp.ones((2, 12)))
    scalars = (jnp.array([0.1, 0.93]), jnp.array([4.5, 1.3]), jnp.array([0.05, 0.7]))
    made = []
    for dtype in (jnp.float32, jnp.bfloat16):

        def embedding(t, w, h, dtype=dtype):
            module = mmdit.binder(lambda: mmdit.MMDiT(config, rngs=mmdit.nnx.Rngs(0), dtype=dtype))(
                params
            )
            return module.embedding(t, text.pooled, w, h)

        made.append(jax.jvp(embedding, scalars, jax.tree.map(jnp.ones_like, scalars)))
    for exact, wide in zip(*made):
        assert wide.dtype == jnp.float32
        np.testing.assert_array_equal(wide, exact)


def test_a_time_given_in_bfloat16_is_embedded_in_float32():
    rough = jnp.array([0.3, 0.7], jnp.bfloat16)
    features = mmdit.sinusoidal_features(1000 * rough.astype(jnp.float32))
    assert mmdit.sinusoidal_features(rough).dtype == features.dtype == jnp.float32


def test_products_of_embedders_keep_float32s_operands():
    """TPUs round them to bfloat16, and GPUs to TF32, unless the program says otherwise."""

    def embed(t):
        return mmdit.time_embedding(SMALL, mixed_embedder(SMALL.hidden_size), t)

    text = str(jax.make_jaxpr(embed)(jnp.ones(2)))
    assert text.count("dot_general") == text.count("Precision.HIGHEST, Precision.HIGHEST") == 2


def test_a_run_holds_embedders_as_they_are():
    config = base()
    with config.unlocked():
        config.dtype, config.lora.rank, config.lora.base = "bfloat16", 2, "int8"
    shapes = jax.eval_shape(
        lambda: frozen.frozen_network(config, mmdit.initial_parameters(SMALL, mmdit.nnx.Rngs(0)))
    )
    for name, tree in shapes.items():
        kinds = {leaf.dtype.name for leaf in jax.tree.leaves(tree)}
        if name.endswith("_embedder"):
            assert kinds == {"float32"}
        elif name.endswith("_blocks"):
            assert "int8" in kinds
        else:
            assert kinds == {"bfloat16"}


def test_schedules_and_angles_are_float32_whatever_the_samples_are():
    x = jnp.ones((2, 4, 3), jnp.bfloat16)
    t = jnp.array([0.3, 0.9])
    assert flow.interpolate(x, x, t).dtype == jnp.float32
    assert flow.straight_step(x, t, 0 * t, x).dtype == jnp.float32
    assert flow.trig_to_linear(x, t, 0.5).dtype == jnp.float32
