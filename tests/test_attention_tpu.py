"""The TPU kernels compile with the TPU compiler, for every chip; no TPU is needed, libtpu is."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jax_distill.ops.attention.attention import attention

pytest.importorskip("libtpu", reason="the TPU compiler is part of jax[tpu]")


@functools.cache
def devices(topology):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by tests in parallel
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if topology.endswith("1x1") else {}
    return topologies.get_topology_desc(topology, platform="tpu", **bounds).devices


def step(query, key, value):
    """All three kernels: value and tangent, and the gradient beside the stopped tangent."""

    def with_tangent(*primals):
        output, tangent = jax.jvp(functools.partial(attention), primals, primals)
        return output, jax.lax.stop_gradient(tangent)

    output, pull = jax.vjp(with_tangent, query, key, value)
    return output, pull(output)


def compiled(sharding, shape, dtype=jnp.bfloat16):
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return jax.jit(step).lower(x, x, x).compile()


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
def test_kernels_compile_and_hold_no_scores(topology):
    sharding = SingleDeviceSharding(devices(topology)[0])
    scores = 24 * 4352**2 * 4
    at_1024_pixels = compiled(sharding, (1, 4352, 24, 128))
    assert at_1024_pixels.as_text().count("tpu_custom_call") >= 2
    assert at_1024_pixels.memory_analysis().temp_size_in_bytes <= 0.1 * scores
    compiled(sharding, (1, 1000 + 77, 2, 64))


def test_float32():
    compiled(SingleDeviceSharding(devices("v5e:1x1")[0]), (1, 1280, 1, 128), jnp.float32)


def test_sharded_over_batch_and_heads():
    """Automatic sharding: each chip runs the kernels on its own, and nothing is sent."""
    axes = {"axis_types": (AxisType.Auto,) * 3, "devices": devices("v5e:2x2")}
    mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), **axes)
    spec = PartitionSpec(("data", "fsdp"), None, "tensor", None)
    text = compiled(NamedSharding(mesh, spec), (4, 1280, 4, 128)).as_text()
    assert "tpu_custom_call" in text
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))
