"""The transformer is FLUX's, on the same weights, and so are its derivatives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_flux
import torch
from diffusers.models.embeddings import get_timestep_embedding
from flax import nnx

from jax_distill.flow import Text
from jax_distill.models import mmdit
from jax_distill.models.binding import binder
from jax_distill.models.blocks import NORM_EPSILON, modulate
from jax_distill.models.mmdit import MMDiT, MMDiTConfig, initial_parameters
from jax_distill.planning.flops import count_flops

PLAIN = MMDiTConfig(
    in_channels=6,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=10,
    pooled_projection_dim=12,
    axes_dims_rope=(2, 10, 4),
)
GUIDED = dataclasses.replace(
    PLAIN, num_attention_heads=2, guidance_embeds=True, axes_dims_rope=(4, 6, 6)
)
DEEP = dataclasses.replace(GUIDED, num_layers=2, num_single_layers=3, axes_dims_rope=(8, 2, 6))
INTERVAL = dataclasses.replace(GUIDED, interval_embeds=True)
SHALLOW = dataclasses.replace(PLAIN, num_layers=2)

# Network, rows and columns of image tokens (None: a square by default), text tokens.
CASES = {
    "no_guidance": (PLAIN, None, 1),
    "one_row": (GUIDED, (1, 9), 7),
    "deep": (DEEP, (3, 5), 5),
}


def inputs(config, tokens=16, text_tokens=3, batch=2, seed=0, dtype=np.float32):
    """(x, t, text, guidance) for the network."""
    rng = np.random.default_rng(seed)
    text = Text(
        rng.standard_normal((batch, text_tokens, config.joint_attention_dim)).astype(dtype),
        rng.standard_normal((batch, config.pooled_projection_dim)).astype(dtype),
    )
    x = rng.standard_normal((batch, tokens, config.in_channels)).astype(dtype)
    t = rng.uniform(0, 1, batch).astype(dtype)
    guidance = rng.uniform(3.5, 4.5, batch).astype(dtype) if config.guidance_embeds else None
    return x, t, text, guidance


def random_parameters(config, dtype=np.float32):
    """Parameters none of which is zero."""
    rng = np.random.default_rng(7)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            return (noise * leaf.shape[-2] ** -0.5).astype(dtype)
        return ((path[-1].key == "scale") + 0.3 * noise).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, random_flux.shapes(config))


as_network = functools.cache(mmdit.as_network)


@functools.cache
def velocity(config, dtype="float32", grid=None):
    return jax.jit(as_network(config, dtype=dtype, grid=grid).velocity)


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(expected).max()


def of_diffusers(model, grid, x, t, text, guidance):
    rows, columns = grid or (4, 4)
    image_ids = torch.zeros(rows, columns, 3)
    image_ids[..., 1] += torch.arange(rows)[:, None]
    image_ids[..., 2] += torch.arange(columns)[None, :]
    tensor = torch.from_numpy
    return model(
        hidden_states=tensor(x),
        encoder_hidden_states=tensor(text.sequence),
        pooled_projections=tensor(text.pooled),
        timestep=tensor(t),
        img_ids=image_ids.reshape(-1, 3),
        txt_ids=torch.zeros(text.sequence.shape[1], 3),
        guidance=None if guidance is None else tensor(guidance),
        return_dict=False,
    )[0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_velocity_is_that_of_diffusers(case, monkeypatch):
    config, grid, text_tokens = CASES[case]
    model = random_flux.reference(config)
    args = inputs(config, np.prod(grid or 16), text_tokens)
    ours = velocity(config, grid=grid)(random_flux.ported(config, model), *args)
    assert relative_error(ours, of_diffusers(model, grid, *args)) <= 1e-5

    # What is left is torch's float32 exp, an ulp off for some frequencies of the embedded 1000 w.
    exp = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: exp(x.double()).to(x.dtype))
    assert relative_error(ours, of_diffusers(model, grid, *args)) <= 2e-6


def test_sinusoidal_features_are_those_of_diffusers():
    values = np.linspace(0, 5000, 64, dtype=np.float32)
    theirs = get_timestep_embedding(
        torch.from_numpy(values), 256, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    ours = mmdit.sinusoidal_features(jnp.asarray(values))
    ulp = np.finfo(np.float32).eps
    bound = ulp * (2 * values[:, None] + 1)  # the angles' own rounding
    assert (np.abs(ours - theirs.numpy()) <= bound).all()


REMAT_OF_TIME_SCALE = {1.0: "none", 1000.0: "full"}  # tangents go through either


@functools.cache
def velocity_and_tangent(time_scale):
    remat = REMAT_OF_TIME_SCALE[time_scale]
    config = dataclasses.replace(INTERVAL, time_scale=time_scale, remat=remat)
    network = as_network(config, dtype=jnp.float64)
    params = random_parameters(config, np.float64)

    @jax.jit
    def evaluate(point, direction, text, guidance):
        def along(x, t, interval):
            return network.velocity(params, x, t, text, guidance, interval)

        return jax.jvp(along, point, direction)

    return evaluate


DIRECTIONS = {"x": (1, 0, 0), "t": (0, 1, 0), "x_and_t": (1, 1, 0), "interval": (0, 0, 1)}


@pytest.mark.parametrize("time_scale", REMAT_OF_TIME_SCALE)
def test_jvp_is_the_finite_difference(time_scale):
    with jax.enable_x64(True):
        x, t, text, guidance = inputs(INTERVAL, dtype=np.float64)
        point = (x, t, 0.4 * t)
        other = inputs(INTERVAL, seed=1, dtype=np.float64)
        evaluate = velocity_and_tangent(time_scale)
        step = 1e-4 / time_scale
        for name, mask in DIRECTIONS.items():
            vector = zip(mask, (other[0], other[1], other[1] + 1), strict=True)
            direction = tuple(on * d for on, d in vector)
            _, tangent = evaluate(point, direction, text, guidance)

            def at(sign, direction=direction):
                moved = tuple(p + sign * step * d for p, d in zip(point, direction, strict=True))
                return np.asarray(evaluate(moved, direction, text, guidance)[0])

            assert relative_error(tangent, (at(1) - at(-1)) / (2 * step)) <= 1e-6, name


def test_time_scale_is_a_change_of_units():
    with jax.enable_x64(True):
        x, t, text, guidance = inputs(INTERVAL, dtype=np.float64)
        zero, one = np.zeros_like(x), np.ones_like(t)
        unit = velocity_and_tangent(1.0)((x, t, t / 2), (zero, one, one), text, guidance)
        milli = velocity_and_tangent(1000.0)(
            (x, t / 1000, t / 2000), (zero, one / 1000, one / 1000), text, guidance
        )
        for one, other in zip(unit, milli, strict=True):
            assert relative_error(one, other) <= 1e-12


def unrolled(config):
    """The network with a Python loop over the layers."""
    bind = binder(lambda: MMDiT(config, rngs=nnx.Rngs(0)))

    def each(blocks, count):
        graph, state = nnx.split(blocks)
        return [
            nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(count)
        ]

    def apply(params, x, t, text, guidance):
        model = bind(params)
        tokens = text.sequence.shape[1]
        embedding = model.embedding(t, text.pooled, guidance)
        rotary = jnp.asarray(mmdit.rotary_table(config, tokens, mmdit.square_grid(x.shape[1])))
        image, sequence = model.image_in(x), model.text_in(text.sequence)
        for block in each(model.double_blocks, config.num_layers):
            image, sequence = block(image, sequence, embedding, rotary)
        joint = jnp.concatenate([sequence, image], axis=1)
        for block in each(model.single_blocks, config.num_single_layers):
            joint = block(joint, embedding, rotary)
        scale, shift = jnp.split(model.out_modulation(nnx.silu(embedding)), 2, axis=-1)
        return model.image_out(modulate(joint[:, tokens:], shift, scale))

    return apply


def test_scan_and_rematerialisation_change_nothing():
    """Value and gradients of a loss that holds a stopped tangent, as sCM's does."""
    x, t, text, guidance = inputs(SHALLOW, tokens=4)

    def gradients(apply, tangent=None):
        def loss(params, x):
            def along(x, t):
                return apply(params, x, t, text, guidance)

            if tangent is None:
                value, moved = jax.jvp(along, (x, t), (jnp.cos(x), 1e-3 * jnp.ones_like(t)))
                moved = jax.lax.stop_gradient(moved)
            else:
                value, moved = along(x, t), tangent
            return jnp.mean(jnp.square(value) + value * moved), moved

        evaluate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        return evaluate(random_parameters(SHALLOW), x)

    def rematerialised(policy):
        return as_network(dataclasses.replace(SHALLOW, remat=policy)).velocity

    (_, tangent), _ = expected = gradients(rematerialised("full"))
    for apply in (rematerialised("none"), rematerialised("dots"), unrolled(SHALLOW)):
        actual = gradients(apply, tangent)
        errors = jax.tree.map(relative_error, actual, expected)
        assert max(jax.tree.leaves(errors)) <= 2e-5, errors


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_tangent_beside_a_gradient_costs_no_second_forward(remat):
    apply = as_network(dataclasses.replace(SHALLOW, remat=remat)).velocity
    x, t, text, guidance = inputs(SHALLOW)

    def forward(params):
        return apply(params, x, t, text, guidance)

    def with_tangent(params):
        along = functools.partial(apply, params, text=text, guidance=guidance)
        return jax.jvp(along, (x, t), (x, t))

    def gradient(params):
        return jax.grad(lambda params: jnp.sum(forward(params)))(params)

    def gradient_beside_tangent(params):
        def loss(params):
            value, tangent = with_tangent(params)
            return jnp.sum(value * jax.lax.stop_gradient(tangent))

        return jax.grad(loss)(params)

    functions = (forward, with_tangent, gradient, gradient_beside_tangent)
    shapes = random_flux.shapes(SHALLOW)
    one, tangent, separate, together = (count_flops(function, shapes) for function in functions)
    assert together == tangent + separate - one
    assert 2 * one < tangent < 2.5 * one


def test_bfloat16_computation():
    args, params = inputs(DEEP), random_parameters(DEEP)
    half = velocity(DEEP, "bfloat16")(params, *args)
    full = velocity(DEEP)(params, *args)
    assert half.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(half - full)) / np.mean(np.square(full)))
    assert 1e-4 < error < 2e-2, error


def test_embedding_is_all_that_the_network_sees_of_time_guidance_and_pooled_text():
    """Change the three, take the change of their embedding off again: the velocity is the same."""
    network, params = as_network(DEEP), random_parameters(DEEP)
    x, t, text, guidance = inputs(DEEP)
    other = inputs(DEEP, seed=3)
    samples = ((t, text.pooled, guidance), (other[1], other[2].pooled, other[3]))
    # One time, guidance and pooled text for the whole batch, and so one change of the bias.
    before, after = (tuple(np.repeat(v[:1], 2, axis=0) for v in sample) for sample in samples)

    def run(function, params, sample, *first):
        t, pooled, guidance = sample
        return function(params, *first, t, Text(text.sequence, pooled), guidance)

    change = run(network.embedding, params, before) - run(network.embedding, params, after)
    linear = params["time_embedder"]["linear_2"]
    shifted = params["time_embedder"] | {"linear_2": linear | {"bias": linear["bias"] + change[0]}}
    compensated = params | {"time_embedder": shifted}
    expected = run(velocity(DEEP), params, before, x)
    assert relative_error(run(velocity(DEEP), compensated, after, x), expected) <= 1e-5
    assert relative_error(run(velocity(DEEP), params, after, x), expected) >= 0.1


def test_blocks_of_zero_modulation_are_identities():
    params = random_parameters(DEEP)
    for blocks in ("double_blocks", "single_blocks"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params[blocks]):
            if "modulation" in jax.tree_util.keystr(path):
                leaf[...] = 0
    x, t, text, guidance = inputs(DEEP)
    embedding = np.asarray(as_network(DEEP).embedding(params, t, text, guidance))

    def linear(name, value):
        return value @ params[name]["kernel"] + params[name]["bias"]

    image = linear("image_in", x)
    image = image - image.mean(-1, keepdims=True)
    image = image / np.sqrt(np.square(image).mean(-1, keepdims=True) + NORM_EPSILON)
    modulation = linear("out_modulation", embedding / (1 + np.exp(-embedding)))
    scale, shift = np.split(modulation[:, None], 2, axis=-1)
    expected = linear("image_out", image * (1 + scale) + shift)
    assert relative_error(velocity(DEEP)(params, x, t, text, guidance), expected) <= 1e-5


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(lambda: initial_parameters(INTERVAL, nnx.Rngs(0)))()


def test_a_fresh_network_is_zero(fresh):
    output = velocity(INTERVAL)(fresh, *inputs(INTERVAL))
    np.testing.assert_array_equal(output, 0)
    assert all(np.any(fresh[name]["linear_1"]["kernel"]) for name in fresh if "embedder" in name)


def test_fresh_guidance_and_interval_embedders_add_nothing(fresh):
    _, t, text, guidance = inputs(INTERVAL)
    bare = dataclasses.replace(INTERVAL, guidance_embeds=False, interval_embeds=False)
    removed = ("guidance_embedder", "interval_embedder")
    rest = {name: leaf for name, leaf in fresh.items() if name not in removed}
    expected = as_network(bare).embedding(rest, t, text)
    model = binder(lambda: MMDiT(INTERVAL, rngs=nnx.Rngs(0)))(fresh)
    np.testing.assert_array_equal(model.embedding(t, text.pooled, guidance, t / 2), expected)
    assert np.abs(expected).max() > 0.1


def test_no_interval_is_an_interval_of_zero():
    params = random_parameters(INTERVAL)
    x, t, text, guidance = inputs(INTERVAL)
    model = binder(lambda: MMDiT(INTERVAL, rngs=nnx.Rngs(0)))(params)
    none = as_network(INTERVAL).embedding(params, t, text, guidance)
    np.testing.assert_array_equal(none, model.embedding(t, text.pooled, guidance, 0 * t))
    assert relative_error(model.embedding(t, text.pooled, guidance, t), none) >= 0.1


@pytest.mark.parametrize(
    ("config", "grid", "changes", "message"),
    [
        (GUIDED, None, {"guidance": None}, "guidance: .* one must be given"),
        (PLAIN, None, {"guidance": np.ones(2)}, "guidance: .* no guidance embedding"),
        (GUIDED, None, {"interval": np.ones(2)}, "interval: .* no second time embedder"),
        (PLAIN, (3, 5), {}, r"grid: \(3, 5\) has 15 tokens, x has 16"),
        (PLAIN, None, {"x": np.ones((2, 15, 6))}, "grid: 15 tokens are not a square"),
    ],
)
def test_calls_that_do_not_fit_are_refused(config, grid, changes, message):
    x, t, text, guidance = inputs(config)
    call = {"x": x, "t": t, "text": text, "guidance": guidance} | changes
    network = as_network(config, grid=grid)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: network.velocity(random_flux.shapes(config), **call))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes_dims_rope": (4, 6, 8)}, "must add up to attention_head_dim, which is 16"),
        ({"axes_dims_rope": (5, 5, 6)}, "must all be even"),
        ({"remat": "some"}, "remat: 'some' is not one of none, full, dots"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **changes)
