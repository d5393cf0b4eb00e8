"""Chooses the implementation of attention's primitives for the platform that is lowered for."""

import functools
import logging
import math
from types import ModuleType

import jax
from jax.core import ShapedArray
from jax.interpreters import mlir
from jax.sharding import PartitionSpec

from jax_distill.ops.attention import blocked, flash_jvp_gpu, flash_jvp_tpu, formulas
from jax_distill.ops.attention.block_sizes import block_sizes
from jax_distill.ops.attention.signatures import AXES, SIGNATURES, operand_names, split_operands

KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}  # by platform
IMPLEMENTATIONS: dict[str, ModuleType] = {
    "blocked": blocked,
    "pallas_tpu": flash_jvp_tpu,
    "pallas_gpu": flash_jvp_gpu,
}

_KERNEL = {
    "attention": "forward",
    "attention_with_tangent": "forward_tangent",
    "attention_tangent": "forward_tangent",
    "attention_backward": "backward",
}
"""The kernel of a primitive, as `block_sizes` names them."""

# Axes of a mesh, by their names in `devices.sharding`, that split batch and heads.
MESH_AXES = {"b": ("data", "fsdp"), "h": ("tensor",)}

_logger = logging.getLogger(__name__)


def _compute(name: str, module: ModuleType, masked: bool, **options):
    """The function by which an implementation computes a primitive."""

    def function(*operands):
        inputs, rest = split_operands(operands, masked)
        if name == "attention_curvature":
            return formulas.curvature(*inputs, *rest)
        if name == "attention_tangent":
            _, _, *tangents = rest
            return module.forward(*inputs, *tangents, **options)[2:]
        if name != "attention_backward":
            return module.forward(*inputs, *rest, **options)
        output, lse, cotangent, lse_cotangent = rest
        delta = formulas.row_delta(output, cotangent, lse_cotangent)
        return module.backward(*inputs, lse, delta, cotangent, **options)

    return function


def choose(implementation: str, platform: str, query, key, value) -> tuple[str, bool]:
    """Returns the name of the implementation, and whether it is interpreted.

    Args:
      implementation: as asked for.
      platform: the one that is lowered for.
      query, key, value: anything with shape and dtype.

    Raises:
      ValueError: the implementation does not take these shapes.
    """
    wanted = KERNELS.get(platform, "blocked") if implementation == "auto" else implementation
    if wanted == "blocked":
        return wanted, False
    reason = IMPLEMENTATIONS[wanted].unsupported(query, key, value)
    if reason is None:
        return wanted, KERNELS.get(platform) != wanted
    if implementation != "auto":
        raise ValueError(f"attention: {wanted} {reason}; use implementation='auto' or 'blocked'")
    _log_once(f"attention: on {platform} 'blocked' in place of {wanted}, which {reason}")
    return "blocked", False


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning(message)


def lower(name: str, platform: str, ctx, *operands, implementation: str, masked: bool):
    """The lowering rule of the primitive of that name, see `jax.interpreters.mlir`."""
    avals = [ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    if name == "attention_curvature":
        implementation = "blocked"
    chosen, interpret = choose(implementation, platform, *avals[:3])
    wrap, options = None, {}
    if chosen != "blocked":
        (kernels_of,) = (key for key, value in KERNELS.items() if value == chosen)
        blocks = block_sizes(kernels_of, _KERNEL[name], avals[0].shape[-1])
        options = {"interpret": interpret, "blocks": blocks}
    if chosen != "blocked" and not interpret:
        try:
            wrap = _on_each_device(name, masked, avals, ctx.module_context.axis_context)
        except ValueError as reason:
            if implementation != "auto":
                raise
            _log_once(f"attention: 'blocked' in place of {chosen}, since {reason}")
            chosen, options = "blocked", {}
    function = _compute(name, IMPLEMENTATIONS[chosen], masked, **options)
    function = function if wrap is None else wrap(function)
    return mlir.lower_fun(function, multiple_results=True)(ctx.replace(avals_in=avals), *operands)


def _on_each_device(name: str, masked: bool, avals, context):
    """Applies a kernel, which no partitioner can split, on each of a computation's devices.

    Returns:
      None where it sees one device's arrays already, otherwise a function that puts it under
      shard_map, with batch and heads split over the axes of the mesh that `MESH_AXES` names.

    Raises:
      ValueError: the mesh is not known, or partly split by hand.
    """
    if isinstance(context, mlir.SPMDAxisContext):
        if set(context.manual_axes) != set(context.mesh.axis_names):
            raise ValueError("it is under a shard_map over some axes of the mesh only")
        return None
    if getattr(context, "num_devices", 1) == 1:
        return None
    mesh = context.abstract_mesh
    if mesh is None:
        raise ValueError("it runs on several devices, and no NamedSharding gives their mesh")
    operands, results = operand_names(name, masked), SIGNATURES[name][1]
    sizes = {}
    for operand, aval in zip(operands, avals):
        sizes.update(zip(AXES[operand], aval.shape))
    places = {}
    for letter, names in MESH_AXES.items():
        names = tuple(axis for axis in names if axis in mesh.axis_names)
        count = math.prod(mesh.shape[axis] for axis in names)
        places[letter] = names if sizes[letter] % count == 0 else None
        if places[letter] is None:
            _log_once(
                f"attention: {sizes[letter]} {'samples' if letter == 'b' else 'heads'} cannot be"
                f" split over {count} devices ({', '.join(names)}); each computes all of them"
            )

    def specs(kinds):
        return tuple(PartitionSpec(*map(places.get, AXES[kind])) for kind in kinds)

    return functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=specs(operands),
        out_specs=specs(results),
        check_vma=False,
    )
