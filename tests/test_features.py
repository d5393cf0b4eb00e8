"""Hidden tokens are those after each block, with their derivatives, and cost what they need."""

import dataclasses
import functools
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_flux
from flax import nnx
from test_mmdit import GUIDED, as_network, inputs, random_parameters, relative_error

from jax_distill.models import lora, mmdit
from jax_distill.models.binding import binder
from jax_distill.models.blocks import modulate
from jax_distill.models.mmdit import MMDiT
from jax_distill.planning.flops import count_flops

SMALL = dataclasses.replace(GUIDED, num_layers=2)
DOUBLE, SINGLE = SMALL.num_layers, SMALL.num_single_layers
LAST = DOUBLE + SINGLE - 1
BLOCKS = (LAST - 1, 0)  # of either kind, not in order, and not the last one


def unrolled(params, x, t, text, guidance):
    """The velocity and every block's image tokens, from a Python loop over the blocks."""
    model, length = binder(lambda: MMDiT(SMALL, rngs=nnx.Rngs(0)))(params), text.sequence.shape[1]

    def block(stack, number):
        graph, state = nnx.split(stack)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[number], state))

    embedding = model.embedding(t, text.pooled, guidance)
    rotary = jnp.asarray(mmdit.rotary_table(SMALL, length, mmdit.square_grid(x.shape[1])))
    image, sequence, found = model.image_in(x), model.text_in(text.sequence), []
    for number in range(DOUBLE):
        image, sequence = block(model.double_blocks, number)(image, sequence, embedding, rotary)
        found.append(image)
    tokens = jnp.concatenate([sequence, image], axis=1)
    for number in range(SINGLE):
        tokens = block(model.single_blocks, number)(tokens, embedding, rotary)
        found.append(tokens[:, length:])
    scale, shift = jnp.split(model.out_modulation(nnx.silu(embedding)), 2, axis=-1)
    return model.image_out(modulate(found[-1], shift, scale)), found


@pytest.fixture(scope="module")
def point():
    return random_parameters(SMALL), *inputs(SMALL, tokens=4)


@pytest.fixture(scope="module")
def reference(point):
    """The unrolled velocity and features, and the `derivatives` of the features at BLOCKS."""

    def evaluate(params, x, t, text, guidance):
        def chosen(*args):
            found = unrolled(*args, text, guidance)[1]
            return tuple(found[block] for block in BLOCKS)

        return unrolled(params, x, t, text, guidance), derivatives(chosen, params, x, t)

    return jax.jit(evaluate)(*point)


def derivatives(features, params, x, t):
    """Features, their tangent along x and t, and gradients of their sum of squares."""
    along = functools.partial(features, params)
    moved = jax.jvp(along, (x, t), (jnp.cos(x), 1e-3 * jnp.ones_like(t)))

    def loss(params, x):
        return sum(jnp.mean(jnp.square(f)) for f in features(params, x, t))

    return moved, jax.grad(loss, argnums=(0, 1))(params, x)


@functools.cache
def forward(blocks, with_velocity=False):
    return jax.jit(
        functools.partial(as_network(SMALL).features, blocks=blocks, with_velocity=with_velocity)
    )


def assert_near(actual, expected, bound):
    errors = jax.tree.map(relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) <= bound, errors


def test_features_are_the_outputs_of_the_blocks(point, reference):
    """Of all blocks and with the velocity, from one pass; and of those before a block, alone."""
    (velocity, every), _ = reference
    whole = forward(tuple(range(LAST + 1)), with_velocity=True)(*point)
    assert_near(whole, (velocity, tuple(every)), 2e-5)
    few = forward((1, 0, 1))(*point)
    assert_near(few, (every[1], every[0], every[1]), 2e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_tangents_and_gradients_are_those_of_the_unrolled_network(remat, point, reference):
    params, x, t, text, guidance = point
    moved, (expected, of_x) = reference[1]
    network = as_network(dataclasses.replace(SMALL, remat=remat))

    def features(params, x, t):
        return network.features(params, x, t, text, guidance, blocks=BLOCKS)

    found = jax.jit(functools.partial(derivatives, features))(params, x, t)
    gradients = found[1][0]
    assert np.any(gradients["image_in"]["kernel"]) and np.any(found[1][1])
    # What follows the last chosen block has no gradient.
    assert not np.any(gradients["single_blocks"]["out"]["kernel"][LAST - DOUBLE :])
    for name in ("out_modulation", "image_out"):
        assert not any(map(np.any, jax.tree.leaves(gradients.pop(name))))
    expected = {name: expected[name] for name in gradients}
    assert_near(found, (moved, (expected, of_x)), 1e-4)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_block_is_computed_in_vain_or_twice(remat):
    """A block more costs a block; with the velocity, features of any blocks cost nothing."""
    config = dataclasses.replace(SMALL, remat=remat)
    network, (x, *rest) = as_network(config), inputs(config)
    params = random_flux.shapes(config)

    def count(blocks, **settings):
        features = functools.partial(network.features, blocks=blocks, **settings)
        return count_flops(features, params, x, *rest)

    counts = [count((block,)) for block in range(LAST + 1)]
    double, *_, single = np.diff(counts)
    assert np.diff(counts[:DOUBLE]).tolist() == [double] * (DOUBLE - 1)
    assert np.diff(counts[DOUBLE - 1 :]).tolist() == [single] * SINGLE
    assert double > single > counts[0] - double > 0
    width = config.hidden_size
    last_layer = 2 * len(x) * width * (2 * width + x.shape[1] * config.in_channels)
    velocity = count_flops(network.velocity, params, x, *rest)
    assert velocity == counts[-1] + last_layer
    assert count(BLOCKS) == counts[LAST - 1]
    assert count(BLOCKS, with_velocity=True) == velocity


def scans(function, *args):
    """Each scan's length, and the shapes that it returns."""
    equations = jax.make_jaxpr(function)(*args).eqns
    found = [equation for equation in equations if equation.primitive.name == "scan"]
    return [(e.params["length"], [v.aval.shape for v in e.outvars]) for e in found]


def test_only_what_is_asked_for_is_held():
    """The velocity's scans hold the tokens alone, those of features the chosen outputs beside."""
    (x, t, text, guidance), params = inputs(SMALL), random_flux.shapes(SMALL)
    batch, length, width = *text.sequence.shape[:2], SMALL.hidden_size
    image, joint = (batch, x.shape[1], width), (batch, length + x.shape[1], width)
    streams = [image, (batch, length, width)]
    args = params, x, t, text, guidance
    network = as_network(SMALL)
    assert scans(network.velocity, *args) == [(DOUBLE, streams), (SINGLE, [joint])]
    chosen = functools.partial(network.features, blocks=(0, 1, LAST - 1))
    assert scans(chosen, *args) == [
        (DOUBLE, [*streams, (2, *image)]),
        (SINGLE - 1, [joint, (1, *image)]),
    ]


def test_parameters_are_not_copied():
    """Neither for a part of a stack, nor for its gradient, which is written in place."""
    config = dataclasses.replace(SMALL, num_single_layers=12, remat="full")
    network, args = as_network(config), inputs(config, tokens=4)

    def loss(params):
        return sum(map(jnp.sum, network.features(params, *args, blocks=(4, 10))))

    params = random_flux.shapes(config)
    stack = sum(leaf.size * 4 for leaf in jax.tree.leaves(params["single_blocks"]))
    for function in (loss, jax.grad(loss)):
        memory = jax.jit(function).lower(params).compile().memory_analysis()
        assert memory.temp_size_in_bytes < stack / 2


def test_adapters_beside_int8_kernels(point):
    params, *args = point
    adapters = lora.LoRA(2, 4.0, "blocks/.*(query|mlp_in|out)/kernel")
    base = lora.quantized(params)
    state = jax.tree.map(lambda leaf: leaf + 0.1, adapters.split(jax.random.key(0), base))
    adapted = adapters.attach(base, state)
    assert isinstance(adapted["single_blocks"]["out"]["kernel"].base, lora.Quantized)
    found = forward((1, 0, 1))(adapted, *args)
    assert_near(found, forward((1, 0, 1))(lora.merged(adapted), *args), 2e-5)
    assert relative_error(found[0], forward((1, 0, 1))(params, *args)[0]) > 0.1


@pytest.mark.parametrize("blocks", [(), (-1,), (0, LAST + 1)])
def test_blocks_that_do_not_exist_are_refused(blocks):
    network, params = as_network(SMALL), random_flux.shapes(SMALL)
    with pytest.raises(ValueError, match=r"blocks: \(.*\) must be numbers of .*, from 0 to 3"):
        jax.eval_shape(lambda: network.features(params, *inputs(SMALL), blocks=blocks))


ON_A_MESH = """
    import os, sys
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    sys.path.insert(0, {tests!r})
    import jax
    import jax.numpy as jnp
    from mesh_steps import gathered_stacks
    from test_features import BLOCKS, SMALL, as_network, assert_near, inputs, random_parameters
    from jax_distill.devices import sharding

    args = random_parameters(SMALL), *inputs(SMALL, tokens=4, batch=8)

    def loss(params, *rest):
        found = as_network(SMALL).features(params, *rest, blocks=BLOCKS, with_velocity=True)
        return sum(jnp.mean(jnp.sin(f)) for f in jax.tree.leaves(found)), found

    evaluate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    options = {{"xla_backend_optimization_level": 0}}
    expected = jax.jit(evaluate, compiler_options=options)(*args)
    mesh = sharding.make_mesh({{"data": 2, "fsdp": 2, "tensor": 2}})
    params = sharding.put(args[0], sharding.shard_state(args[0], mesh))
    args = params, *sharding.shard_batch(args[1:], mesh)
    with sharding.activations_on(mesh):
        program = jax.jit(lambda *args: evaluate(*args)).lower(*args).compile(options)
    found = program(*args)
    assert_near(jax.device_get(found), expected, 2e-5)
    (_, (_, features)), _ = found
    assert all(f.sharding.spec == sharding.BATCH for f in features), features[0].sharding
    assert not gathered_stacks(program.as_text(), params)[1]
"""


@pytest.mark.slow
def test_features_on_a_mesh_are_those_on_one_device():
    """With the velocity and the gradients; and no device gathers a whole stack of layers.

    Few tokens, of other numbers of text and image, are where XLA leaves sums out, see `placed`.
    """
    root = Path(__file__).parents[1]
    code = textwrap.dedent(ON_A_MESH).format(tests=str(root / "tests"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
