"""The mesh, and the tables that place every parameter and every activation on it."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_distill.ops import placement

AXES = ("data", "fsdp", "tensor")

# Logical axes of a parameter by its path; the first pattern that matches decides. Leading layer
# axes of stacked blocks are never split. An adapter's long axis is always split over `fsdp`, within
# its kernel's part: a layer gathers it where the kernel lies.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(query|key|value|mlp_in|modulation|linear_1)/kernel$", ("embed", "heads")),
    (r"(attention_out|mlp_out|out|linear_2)/kernel$", ("heads", "embed")),
    (r"/kernel$", ("embed", "heads")),
    (r"(attention_out|mlp_out|out|linear_2)/lora_a$", ("long_heads", None)),
    (r"(attention_out|mlp_out|out|linear_2)/lora_b$", (None, "embed")),
    (r"/lora_a$", ("embed", None)),
    (r"/lora_b$", (None, "long_heads")),
    (r"token_embedding$", ("embed",)),  # of the text encoders: (vocabulary, width)
    (r"", ()),
)
ALL_FSDP: Mapping[str, int] = {"data": 1, "fsdp": -1, "tensor": 1}  # for drawing, on any machine
MESH_AXES: Mapping[str | None, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "long_heads": ("tensor", "fsdp"),
    None: (),
}
BATCH = PartitionSpec(("data", "fsdp"))

# Axes of activations, of what flows through the networks, and of parts of kernels, by the names of
# parameters' axes. Without a rule of its own, "tokens" is not split: they meet in attention.
ACTIVATION_AXES: Mapping[str, tuple[str, ...]] = {
    **{name: axes for name, axes in MESH_AXES.items() if name},
    "batch": ("data", "fsdp"),
    "tokens": (),
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices, neighbours on the mesh being near each other.

    Where devices are of several slices, which a slower network joins, whole slices lie along
    `data`, and along `fsdp` as far as `data` does not divide among them; never along `tensor`.

    Args:
      sizes: devices along each of `AXES`; one of them may be -1: the rest.
      devices: those of another machine; by default this program's.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or slices would be cut.
    """
    count = jax.device_count() if devices is None else len(devices)
    shape = mesh_shape(sizes, count)
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    every = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in every})
    if slices == 1:
        options = {} if devices is None else {"devices": devices}
        return jax.make_mesh(shape, AXES, axis_types=types, **options)
    outer = slice_shape(shape, slices)
    inner = [size // across for size, across in zip(shape, outer)]
    # As jax.make_mesh has it: the axes of these chips' grids are often shorter than a mesh's.
    split = every[0].device_kind in ("TPU v5 lite", "TPU v5e")
    placed = mesh_utils.create_hybrid_device_mesh(
        inner, outer, every, allow_split_physical_axes=split
    )
    return Mesh(placed, AXES, axis_types=types)


def local_mesh() -> Mesh:
    """A mesh of this process' devices, for work that it does without the others."""
    return make_mesh(ALL_FSDP, jax.local_devices())


def mesh_shape(sizes: Mapping[str, int], count: int) -> tuple[int, ...]:
    """Sizes along `AXES` for `count` devices, the one that is -1 filled in.

    Raises:
      ValueError: they do not multiply to `count`.
    """
    shape = [int(sizes[axis]) for axis in AXES]
    named = dict(zip(AXES, shape))
    free = [i for i, size in enumerate(shape) if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh: only one of {', '.join(AXES)} may be -1, got {named}")
    left = count  # devices that the axes before do not divide among them
    for axis, size in zip(AXES, shape):
        if size == -1:
            continue
        if size < 1 or left % size:
            among = f"the {left} of {count} devices left"
            if left == count:
                among = f"{count} device{'s' * (count > 1)}"
            choices = [str(size) for size in range(1, left + 1) if left % size == 0]
            raise ValueError(
                f"mesh.{axis}: {size} does not divide {among}; make it"
                f" {'one of ' * (left > 1)}{', '.join(choices)}"
            )
        left //= size
    if free:
        shape[free[0]] = left
    elif left != 1:
        raise ValueError(
            f"mesh: {named} needs {count // left} devices, there are {count}; make one of"
            f" {', '.join(AXES)} -1, to take what is left"
        )
    return tuple(shape)


def slice_shape(shape: Sequence[int], slices: int) -> tuple[int, ...]:
    """How many slices lie along each of `AXES` in a mesh of this shape.

    Raises:
      ValueError: a slice would be cut.
    """
    data = math.gcd(slices, shape[0])
    fsdp, rest = math.gcd(slices // data, shape[1]), slices // data
    if fsdp != rest:
        raise ValueError(
            f"mesh: {dict(zip(AXES, shape))} cuts the {slices} slices of devices; make mesh.data a"
            f" multiple of {slices}"
        )
    return data, fsdp, 1


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where a parameter lives: axes that the mesh does not divide are kept whole."""
    names = next(axes for pattern, axes in PARAMETER_AXES if re.search(pattern, path))
    spec: list[str | tuple[str, ...] | None] = [None] * len(shape)
    for offset, (name, left) in enumerate(zip(reversed(names), reversed(shape)), start=1):
        axes = []
        for axis in MESH_AXES[name]:
            if left % mesh.shape[axis] == 0:
                axes.append(axis)
                left //= mesh.shape[axis]
        if axes:
            spec[-offset] = axes[0] if len(axes) == 1 else tuple(axes)
    return PartitionSpec(*spec)


def activations_on(mesh: Mesh, *, split_tokens: bool = False) -> AbstractContextManager[None]:
    """Within, while a function is traced, networks place their activations on the mesh.

    Args:
      mesh: with the axes `AXES`.
      split_tokens: split tokens over `tensor` wherever heads are not (Megatron's sequence
        parallelism, arXiv:2205.05198), for pictures of many tokens.
    """
    tokens = {"tokens": ("tensor",)} if split_tokens else {}
    return placement.placed_on(mesh, {**ACTIVATION_AXES, **tokens})


def shard_state(state: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a training state, by the name of the parameter in its path."""

    def place(path, leaf):
        name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        name = re.sub(r"/kernel(/(base|values|scale))+$", "/kernel", name)  # see models/lora.py
        name = re.sub(r"/kernel(/lora_[ab])$", r"\1", name)
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


def put(tree: Any, places: Any) -> Any:
    """Arrays on their places, a tree of shardings.

    Args:
      tree: of arrays on the mesh already, or arrays that each process has, the same on all.
      places: a sharding for each leaf, or for each branch of the tree.
    """

    def place(leaf, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, sharding)
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, tree, jax.tree.broadcast(places, tree))


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch this process's devices hold, in order.

    Raises:
      ValueError: the batch does not divide among the devices.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shares:
        raise ValueError(
            f"batch_size: {batch_size} does not divide among {shares} devices (mesh.data x"
            f" mesh.fsdp); make it a multiple of {shares}"
        )
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in places.values()]))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch of all processes, split along its first axis, of which each gives `local_rows`."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
