"""The mesh and the table of shardings; and that neither changes what is computed."""

import dataclasses
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from regression import Regression, Source, frozen, parameters, small_config, student
from tiny_runs import STUDENT, settings

from jax_distill.assembly import build
from jax_distill.config import ConfigError
from jax_distill.devices.sharding import (
    AXES,
    activations_on,
    local_rows,
    make_mesh,
    mesh_shape,
    parameter_spec,
    shard_batch,
    shard_state,
    slice_shape,
)
from jax_distill.models import lora
from jax_distill.ops.placement import constrain
from jax_distill.runs import checks
from jax_distill.training import checkpoint, loop
from jax_distill.training.step import init_state, make_optimizers

MESH = AbstractMesh((2, 4, 2), AXES)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        # Inputs of a projection over fsdp, its outputs over tensor; the other way round behind it.
        ("params/network/double_blocks/image/heads/query/kernel", (6, 32, 64), (None, "f", "t")),
        ("params/network/double_blocks/image/attention_out/kernel", (6, 64, 32), (None, "t", "f")),
        ("params/network/single_blocks/mlp_in/kernel", (6, 32, 64), (None, "f", "t")),
        ("params/network/single_blocks/out/kernel", (6, 64, 32), (None, "t", "f")),
        ("params/network/image_in/kernel", (32, 64), ("f", "t")),
        # An adapter's long axis is split over fsdp, and over tensor where its kernel's is; no rank.
        ("params/network/single_blocks/mlp_in/lora_a", (6, 32, 8), (None, "f", None)),
        ("params/network/single_blocks/mlp_in/lora_b", (6, 8, 64), (None, None, "tf")),
        ("params/network/single_blocks/out/lora_a", (6, 64, 8), (None, "tf", None)),
        ("params/network/single_blocks/out/lora_b", (6, 8, 32), (None, None, "f")),
        ("params/network/single_blocks/out/lora_a", (6, 12, 8), (None, "t", None)),
        ("params/network/single_blocks/out/lora_a", (6, 20, 8), (None, "t", None)),
        ("params/network/single_blocks/out/lora_a", (6, 9, 8), (None, None, None)),
        ("ema/network/image_in/lora_b", (8, 64), (None, "tf")),
        # Vectors and scalars are kept whole, and so are axes that the mesh does not divide.
        ("params/network/image_in/bias", (64,), (None,)),
        ("params/network/single_blocks/heads/query_norm/scale", (6, 64), (None, None)),
        ("step", (), ()),
        ("params/network/image_in/kernel", (30, 64), (None, "t")),
        ("params/network/image_in/kernel", (32, 63), ("f", None)),
        ("params/logvar/kernel", (8,), ("t",)),
        # The optimizer's copies lie where the parameter does.
        ("opt_state/1/0/mu/network/image_in/kernel", (32, 64), ("f", "t")),
    ],
)
def test_a_parameter_lives_where_its_path_says(path, shape, expected):
    names = {"f": "fsdp", "t": "tensor", "tf": ("tensor", "fsdp"), None: None}
    spec = parameter_spec(path, shape, MESH)
    assert tuple(spec) == tuple(names[axis] for axis in expected)
    for size, axis in zip(shape, spec):
        axes = (axis,) if isinstance(axis, str) else axis or ()
        assert size % math.prod(MESH.shape[axis] for axis in axes) == 0


def test_the_state_of_adapters_is_divided_among_devices():
    """Parameters, averages and moments: no device has more than its share, but for embedders."""
    config = settings({"name": "scm"}, **STUDENT)
    config.unlock()
    config.lora.rank, config.optimizer.frozen = 4, "embedder|logvar"
    teacher = settings({"name": "time_rescale"}, **STUDENT)
    objective = build.objective(config, teacher)
    optimizers = make_optimizers(objective, config)

    def create():
        return init_state(objective, optimizers, build.initial_parameters(config), 0)

    state = jax.eval_shape(create)
    for sizes, parts in (((1, 8, 1), 8), ((2, 4, 1), 4), ((2, 2, 2), 2)):
        places = shard_state(state, AbstractMesh(sizes, AXES))
        whole = held = 0
        for (path, leaf), place in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(places)):
            if "lora_" in jax.tree_util.keystr(path):
                whole += leaf.size
                held += math.prod(place.shard_shape(leaf.shape))
        assert whole > 4 * 4000 and held * parts <= whole


def test_an_adapter_in_the_place_of_a_kernel_lies_as_it_does_in_the_state():
    a, b = np.zeros((6, 64, 8)), np.zeros((6, 8, 32))
    kernel = lora.Adapted(np.zeros((6, 64, 32)), a, b, 1.0)
    place = shard_state({"out": {"kernel": kernel}}, MESH)["out"]["kernel"]
    beside = shard_state({"out": {"lora_a": a, "lora_b": b}}, MESH)["out"]
    assert (place.lora_a, place.lora_b) == (beside["lora_a"], beside["lora_b"])
    assert place.base.spec == PartitionSpec(None, "tensor", "fsdp")


def test_the_state_is_sharded_by_the_paths_of_its_leaves():
    config = small_config()
    optimizers = make_optimizers(Regression(), config)
    state = init_state(Regression(), optimizers, parameters(), 0)
    places = shard_state(state, make_mesh({"data": 1, "fsdp": -1, "tensor": 1}))
    assert jax.tree.structure(places) == jax.tree.structure(state)
    places = student(places)
    assert places.params["network"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert places.params == places.ema
    moments = [leaf for leaf in jax.tree.leaves(places.opt_state) if len(leaf.spec) == 2]
    assert len(moments) == 2  # Adam's, of the kernel


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((1, -1, 1), 1, (1, 1, 1)),
        ((1, -1, 1), 8, (1, 8, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((-1, 2, 1), 8, (4, 2, 1)),
        ((2, 2, 2), 8, (2, 2, 2)),
        ((-1, -1, 1), 8, "mesh: only one of data, fsdp, tensor may be -1"),
        ((3, -1, 1), 8, "mesh.data: 3 does not divide 8 devices; .* one of 1, 2, 4, 8$"),
        ((0, -1, 1), 8, "mesh.data: 0 does not divide 8 devices"),
        ((-2, 1, 1), 8, "mesh.data: -2 does not divide 8 devices"),
        ((1, 4, 1), 8, "mesh: .* needs 4 devices, there are 8; make one of data, fsdp, tensor -1"),
        ((2, 2, 4), 8, "mesh.tensor: 4 does not divide the 2 of 8 devices left; .* one of 1, 2$"),
        ((-1, 8, 3), 24, (1, 8, 3)),
        ((-1, 8, 9), 24, "mesh.tensor: 9 does not divide the 3 of 24 devices left; .* 1, 3$"),
    ],
)
def test_a_mesh_uses_all_devices_or_says_why_not(sizes, devices, expected):
    sizes = dict(zip(AXES, sizes))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            mesh_shape(sizes, devices)
    else:
        assert mesh_shape(sizes, devices) == expected


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh wants to know of a device."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.mark.parametrize(
    ("shape", "outer"),
    [
        ((2, 4, 1), (2, 1, 1)),
        ((4, 1, 2), (2, 1, 1)),
        ((1, 8, 1), (1, 2, 1)),
        ((1, 4, 2), (1, 2, 1)),
    ],
)
def test_slices_lie_along_data_or_fsdp(shape, outer):
    """The devices of a slice are one block of the mesh; no tensor-parallel group leaves one."""
    chips = [Chip(index, index // 4) for index in range(8)]
    mesh = make_mesh(dict(zip(AXES, shape)), chips)
    assert mesh.devices.shape == shape and slice_shape(shape, 2) == outer
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    inner = [size // across for size, across in zip(shape, outer)]
    np.testing.assert_array_equal(slices, np.kron(np.arange(2).reshape(outer), np.ones(inner)))


def test_a_mesh_that_cuts_slices_is_refused():
    chips = [Chip(index, index // 2) for index in range(8)]
    with pytest.raises(ValueError, match="cuts the 4 slices .* make mesh.data a multiple of 4"):
        make_mesh({"data": 1, "fsdp": 2, "tensor": 4}, chips)


def test_a_batch_too_small_for_a_pod_is_told_the_way_out(monkeypatch):
    monkeypatch.setattr(checks.sharding, "make_mesh", lambda _: AbstractMesh((1, 256, 1), AXES))
    config = small_config(batch_size=64)
    with pytest.raises(ConfigError, match="64 .* make it a multiple of 256, or mesh.tensor 4$"):
        checks.check_batches(config, ["batch_size"], 1000)
    config = small_config(batch_size=63)
    with pytest.raises(ConfigError, match="63 .* make it a multiple of 256$"):
        checks.check_batches(config, ["batch_size"], 1000)


def test_each_process_holds_its_rows():
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    np.testing.assert_array_equal(local_rows(4, mesh), np.arange(4))
    wide = AbstractMesh((2, 4, 2), AXES)
    with pytest.raises(ValueError, match="batch_size: 12 does not divide among 8 devices"):
        local_rows(12, wide)


@pytest.mark.parametrize(
    ("names", "split_tokens", "expected"),
    [
        (("batch", "tokens", None), False, (("data", "fsdp"), None, None)),
        (("batch", "tokens", None), True, (("data", "fsdp"), ("tensor",), None)),
        (("batch", None, "heads"), True, (("data", "fsdp"), None, ("tensor",))),
        ((None, "batch", "heads"), False, (None, None, ("tensor",))),  # 6 is no multiple of 8
    ],
)
def test_activations_are_placed_by_name(names, split_tokens, expected):
    x = jax.ShapeDtypeStruct((16, 6, 8), np.float32)
    assert str(jax.make_jaxpr(lambda x: constrain(x, *names))(x)).count("sharding") == 0
    with activations_on(MESH, split_tokens=split_tokens):
        (equation,) = jax.make_jaxpr(lambda x: constrain(x, *names))(x).eqns
    assert equation.params["sharding"].spec == PartitionSpec(*expected)
    with activations_on(AbstractMesh((1, 1, 1), AXES)):
        assert not jax.make_jaxpr(lambda x: constrain(x, *names))(x).eqns


def test_a_batch_is_split_along_its_first_axis():
    batch = {"x": np.ones((4, 3)), "y": np.arange(4)}
    placed = shard_batch(batch, make_mesh({"data": 1, "fsdp": -1, "tensor": 1}))
    assert placed["x"].sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_array_equal(placed["y"], batch["y"])


SHARDED = """
    import json, os, sys
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import jax
    from regression import Regression, Source, frozen, parameters, small_config
    from jax_distill.devices import sharding
    from jax_distill.training import loop

    every = sharding.make_mesh
    for devices, sizes, steps in ((8, (2, 4), 4), (4, (2, 2), 8)):
        mesh = dict(mesh__data=sizes[0], mesh__fsdp=sizes[1], batch_size=8)
        sharding.make_mesh = lambda sizes: every(sizes, jax.devices()[:devices])
        config = small_config(total_steps=steps, optimizer__schedule="constant", **mesh)
        average = loop.fit(
            config, Path({workdir!r}), Regression(), parameters(), frozen(), Source()
        )
        place = average["network"]["kernel"].sharding
        print(json.dumps([len(place.device_set), str(place.spec)]))
"""


def test_a_run_goes_from_eight_devices_to_four_to_one(tmp_path):
    """And is the run on one, to rounding."""
    root = Path(__file__).parents[1]
    sharded, single = tmp_path / "sharded", tmp_path / "single"
    code = textwrap.dedent(SHARDED).format(tests=str(root / "tests"), workdir=str(sharded))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for line, expected in zip(done.stdout.splitlines()[-2:], (8, 4), strict=True):
        devices, spec = json.loads(line)
        assert devices == expected and "fsdp" in spec
    config = small_config(optimizer__schedule="constant", batch_size=8)
    start = Regression(), parameters(), frozen(), Source()
    found = loop.fit(config, sharded, *start)
    expected = loop.fit(config, single, *start)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert len(a.sharding.device_set) == 1
    for a, b in zip(*(jax.tree.leaves(checkpoint.load_averaged(d)) for d in (sharded, single))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
