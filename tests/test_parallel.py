"""The mesh and the table of shardings; and that neither changes what is computed."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from regression import Regression, Source, frozen, parameters, small_config

from jax_distill import checkpoint, train
from jax_distill.parallel import AXES, make_mesh, parameter_spec, shard_batch, shard_state

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
    names = {"f": "fsdp", "t": "tensor", None: None}
    spec = parameter_spec(path, shape, MESH)
    assert tuple(spec) == tuple(names[axis] for axis in expected)
    for size, axis in zip(shape, spec):
        assert axis is None or size % MESH.shape[axis] == 0


def test_the_state_is_sharded_by_the_paths_of_its_leaves():
    config = small_config()
    optimizer = train.make_optimizer(config.optimizer, config.total_steps)
    state = train.init_state(Regression(), optimizer, parameters(), 0)
    places = shard_state(state, make_mesh({"data": 1, "fsdp": -1, "tensor": 1}))
    assert jax.tree.structure(places) == jax.tree.structure(state)
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
        ((-1, -1, 1), 8, "only one of data, fsdp, tensor may be -1"),
        ((3, -1, 1), 8, "does not divide 8 devices"),
        ((0, -1, 1), 8, "does not divide 8 devices"),
        ((-2, 1, 1), 8, "does not divide 8 devices"),
        ((2, 2, 1), 8, "needs 4 devices, there are 8"),
        ((2, 2, 4), 8, "does not divide 8 devices"),
    ],
)
def test_a_mesh_uses_all_devices_or_says_why_not(monkeypatch, sizes, devices, expected):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "make_mesh", lambda shape, axes, axis_types: (shape, axes))
    sizes = dict(zip(AXES, sizes))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"mesh: .*{expected}"):
            make_mesh(sizes)
    else:
        assert make_mesh(sizes) == (expected, AXES)


def test_a_batch_is_split_along_its_first_axis():
    batch = {"x": np.ones((4, 3)), "y": np.arange(4)}
    placed = shard_batch(batch, make_mesh({"data": 1, "fsdp": -1, "tensor": 1}))
    assert placed["x"].sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_array_equal(placed["y"], batch["y"])


SHARDED = """
    import json, os, sys
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import jax
    from regression import Regression, Source, frozen, parameters, small_config
    from jax_distill import train

    config = small_config(mesh__data=2, mesh__fsdp=2)
    average = train.fit(
        config, Path({workdir!r}), Regression(), parameters(), frozen(), Source()
    )
    print(json.dumps([jax.device_count(), str(average["network"]["kernel"].sharding.spec)]))
"""


def test_a_run_on_four_devices_is_the_run_on_one(tmp_path):
    """To rounding; and its checkpoint is read on one device."""
    root = Path(__file__).parents[1]
    sharded, single = tmp_path / "sharded", tmp_path / "single"
    code = textwrap.dedent(SHARDED).format(tests=str(root / "tests"), workdir=str(sharded))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    devices, spec = json.loads(done.stdout.splitlines()[-1])
    assert devices == 4 and "fsdp" in spec
    config = small_config()
    expected = train.fit(config, single, Regression(), parameters(), frozen(), Source())
    found = checkpoint.load_averaged(sharded)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert len(a.sharding.device_set) == 1
