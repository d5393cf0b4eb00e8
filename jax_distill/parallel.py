"""The mesh, and one table that says where every parameter lives on it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Logical axes of a parameter by its path; the first pattern that matches decides. Leading layer
# axes of stacked blocks are never split.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(query|key|value|mlp_in|modulation|linear_1)/kernel$", ("embed", "heads")),
    (r"(attention_out|mlp_out|out|linear_2)/kernel$", ("heads", "embed")),
    (r"/kernel$", ("embed", "heads")),
    (r"token_embedding$", ("embed",)),  # of the text encoders: (vocabulary, width)
    (r"", ()),
)
ALL_FSDP: Mapping[str, int] = {"data": 1, "fsdp": -1, "tensor": 1}  # for drawing, on any machine
MESH_AXES: Mapping[str, str] = {"embed": "fsdp", "heads": "tensor"}
BATCH = PartitionSpec(("data", "fsdp"))


def mesh_shape(sizes: Mapping[str, int], count: int) -> tuple[int, ...]:
    """Devices along each of `AXES`.

    Args:
      sizes: as in the configuration; one of them may be -1: what is left.
      count: how many devices there are.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    shape = [int(sizes[axis]) for axis in AXES]
    free = [i for i, size in enumerate(shape) if size == -1]
    known = int(np.prod([size for size in shape if size != -1]))
    if len(free) > 1:
        raise ValueError(f"mesh: only one of {', '.join(AXES)} may be -1, got {dict(sizes)}")
    if min(size for size in [*shape, 1] if size != -1) < 1 or count % known:
        raise ValueError(f"mesh: {dict(sizes)} does not divide {count} devices")
    if free:
        shape[free[0]] = count // known
    if int(np.prod(shape)) != count:
        raise ValueError(f"mesh: {dict(sizes)} needs {known} devices, there are {count}")
    return tuple(shape)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices.

    Args:
      sizes: devices along each of `AXES`; one of them may be -1: what is left.
      devices: those of another machine; by default this program's.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    shape = mesh_shape(sizes, jax.device_count() if devices is None else len(devices))
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    options = {} if devices is None else {"devices": devices}
    return jax.make_mesh(shape, AXES, axis_types=types, **options)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where a parameter lives: axes that the mesh does not divide are kept whole."""
    names = next(axes for pattern, axes in PARAMETER_AXES if re.search(pattern, path))
    spec: list[str | None] = [None] * len(shape)
    for offset, name in enumerate(reversed(names), start=1):
        axis = MESH_AXES[name]
        if len(shape) >= offset and shape[-offset] % mesh.shape[axis] == 0:
            spec[-offset] = axis
    return PartitionSpec(*spec)


def shard_state(state: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a training state, by the name of the parameter in its path."""

    def place(path, leaf):
        name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        return NamedSharding(mesh, parameter_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, state)


def gather(tree: Any) -> Any:
    """Arrays of any sharding in the host memory of every process."""

    def whole(leaf: jax.Array) -> np.ndarray:
        if not getattr(leaf, "is_fully_addressable", True):
            place = NamedSharding(leaf.sharding.mesh, PartitionSpec())
            leaf = jax.jit(lambda leaf: leaf, out_shardings=place)(leaf)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's share of a batch on the devices, split along its first axis."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
