"""Primitives behind `attention`, and their derivative rules, which refer to each other.

    attention               q, k, v -> output, log-sum-exp to base two
    attention_with_tangent  q, k, v, dq, dk, dv -> output, log-sum-exp and their tangents
    attention_tangent       the tangents alone; linear in dq, dk, dv
    attention_backward      the transpose of that: cotangents of q, k, v

Forward mode turns the first into the second, which needs six matrix products to the first's two.
Where only q, k, v are known (reverse mode, and rematerialisation), the second comes apart into the
first and the third, and where its tangents are not used it is the first again; the third is
transposed to the fourth. So the gradient of a loss of `jax.jvp`'s output and of its tangent,
stopped, holds one `attention_with_tangent` and one `attention_backward`. The rest of second
derivatives is exact but not fused: `attention_curvature`, how the tangents move with q, k and v,
is linear in those moves, so it waits for them, holds no scores, and is dead code where the tangents
are stopped.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.core import ShapedArray
from jax.extend.core import DropVar, JaxprEqn, Primitive, Var
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe
from jax.sharding import PartitionSpec

from jax_distill.ops.attention import formulas, lowering
from jax_distill.ops.attention.signatures import AXES, SIGNATURES, operand_names, split_operands


def attention(query, key, value, mask, implementation: str) -> jax.Array:
    """Binds the first primitive; see `attention.attention`, which checks the arguments."""
    dtype = jnp.result_type(query, key, value)
    masks = () if mask is None else (mask,)
    operands = (query.astype(dtype), key.astype(dtype), value.astype(dtype), *masks)
    params = {"implementation": implementation, "masked": mask is not None}
    output, _ = attention_p.bind(*operands, **params)
    return output.astype(value.dtype)


def flops(equation: JaxprEqn) -> int | None:
    """Floating point operations of a primitive's matrix products; None for any other equation."""
    signature = SIGNATURES.get(equation.primitive.name)
    if signature is None:
        return None
    query, key, value = (variable.aval.shape for variable in equation.invars[:3])
    scores = math.prod(query[:-1]) * key[1]
    over_d, over_e = signature[2]
    return 2 * scores * (over_d * query[-1] + over_e * value[-1])


def _abstract(name: str, *avals, implementation, masked):
    del implementation
    names = operand_names(name, masked)
    sizes: dict[str, int] = {}
    dtypes: dict[str, Any] = {}
    for operand, aval in zip(names, avals):
        sizes.update(zip(AXES[operand], aval.shape))
        dtypes[operand] = aval.dtype
    dtypes["output"] = dtypes["value"]
    dtypes["lse"] = jnp.promote_types(dtypes["query"], jnp.float32)
    # Under shard_map, results vary over the mesh axes over which an operand does.
    like = max(avals, key=lambda aval: len(aval.manual_axis_type.varying))

    def result(kind):
        shape = tuple(sizes[axis] for axis in AXES[kind])
        if like.sharding.mesh.empty:
            return ShapedArray(shape, dtypes[kind])
        sharding = like.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
        mat = like.manual_axis_type
        return ShapedArray(shape, dtypes[kind], sharding=sharding, manual_axis_type=mat)

    return [result(kind) for kind in SIGNATURES[name][1]]


@functools.cache
def _jitted(primitive, **params):
    return jax.jit(functools.partial(primitive.bind, **params))


def _batch(primitive, operands, axes, **params):
    """vmap: the new axis is merged with the batch."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes) if axis is not None)

    def merge(x, axis):
        if axis is None:
            x = jnp.broadcast_to(x, (size, *x.shape))
        else:
            x = jnp.moveaxis(x, axis, 0)
        return x.reshape(-1, *x.shape[2:])

    results = primitive.bind(*map(merge, operands, axes), **params)
    return [x.reshape(size, -1, *x.shape[1:]) for x in results], [0] * len(results)


def _make(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(functools.partial(_abstract, name))
    primitive.def_impl(lambda *operands, **params: _jitted(primitive, **params)(*operands))
    prim_requires_devices_during_lowering.add(primitive)  # tells the lowering the mesh
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    for platform in (None, *lowering.KERNELS):
        rule = functools.partial(lowering.lower, name, platform or "this platform")
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


attention_p = _make("attention")
attention_with_tangent_p = _make("attention_with_tangent")
attention_tangent_p = _make("attention_tangent")
attention_backward_p = _make("attention_backward")
attention_curvature_p = _make("attention_curvature")


def _any(tangents) -> bool:
    return any(type(tangent) is not ad.Zero for tangent in tangents)


def _zeros_like(arrays):
    return [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in arrays]


def _instantiated(tangents):
    return tuple(map(ad.instantiate_zeros, tangents))


def _add(one, other):
    return [ad.add_tangents(x, y) for x, y in zip(one, other)]


def _masks(mask):
    return () if mask is None else (mask,)


def _attention_jvp(primals, tangents, *, masked, **params):
    results = attention_with_tangent_p.bind(
        *primals, *_instantiated(tangents[:3]), masked=masked, **params
    )
    return results[:2], results[2:]


ad.primitive_jvps[attention_p] = _attention_jvp


def _attention_with_tangent_jvp(primals, tangents, *, masked, **params):
    params["masked"] = masked
    results = attention_with_tangent_p.bind(*primals, **params)
    inputs, linear = split_operands(primals, masked)
    d_inputs, d_linear = split_operands(tangents, masked)
    residuals = (*inputs[:3], *_masks(inputs[3]), *results[:2])
    d_primal, d_tangent = _zeros_like(results[:2]), _zeros_like(results[2:])
    if _any(d_inputs[:3]):
        d_inputs = _instantiated(d_inputs[:3])
        d_primal = attention_tangent_p.bind(*residuals, *d_inputs, **params)
        constants = (*residuals[:-2], results[1], *linear)
        d_tangent = attention_curvature_p.bind(*constants, *d_inputs, d_primal[1], **params)
    if _any(d_linear):
        moved = attention_tangent_p.bind(*residuals, *_instantiated(d_linear), **params)
        d_tangent = _add(d_tangent, moved)
    return results, [*d_primal, *d_tangent]


ad.primitive_jvps[attention_with_tangent_p] = _attention_with_tangent_jvp


def _attention_tangent_jvp(primals, tangents, *, masked, **params):
    params["masked"] = masked
    results = attention_tangent_p.bind(*primals, **params)
    inputs, (_, lse, *linear) = split_operands(primals, masked)
    d_inputs, (_, d_lse, *d_linear) = split_operands(tangents, masked)
    d_results = _zeros_like(results)
    if _any((*d_inputs[:3], d_lse)):
        moves = _instantiated((*d_inputs[:3], d_lse))
        constants = (*inputs[:3], *_masks(inputs[3]), lse, *linear)
        d_results = attention_curvature_p.bind(*constants, *moves, **params)
    if _any(d_linear):
        constants = primals[: -len(linear)]
        moved = attention_tangent_p.bind(*constants, *_instantiated(d_linear), **params)
        d_results = _add(d_results, moved)
    return results, d_results


ad.primitive_jvps[attention_tangent_p] = _attention_tangent_jvp


def _attention_backward_jvp(primals, tangents, *, masked, **params):
    results = attention_backward_p.bind(*primals, masked=masked, **params)
    (query, key, value, mask), rest = split_operands(primals, masked)
    (*d_inputs, _), d_rest = split_operands(tangents, masked)

    def function(query, key, value, *rest):
        return formulas.backward(query, key, value, mask, *rest)

    d_primals = _instantiated((*d_inputs, *d_rest))
    return results, jax.jvp(function, (query, key, value, *rest), d_primals)[1]


ad.primitive_jvps[attention_backward_p] = _attention_backward_jvp


def _attention_curvature_jvp(primals, tangents, *, masked, **params):
    results = attention_curvature_p.bind(*primals, masked=masked, **params)
    (query, key, value, mask), rest = split_operands(primals, masked)
    (*d_inputs, _), d_rest = split_operands(tangents, masked)

    def function(query, key, value, *rest):
        return formulas.curvature(query, key, value, mask, *rest)

    d_primals = _instantiated((*d_inputs, *d_rest))
    return results, jax.jvp(function, (query, key, value, *rest), d_primals)[1]


ad.primitive_jvps[attention_curvature_p] = _attention_curvature_jvp


def _attention_curvature_transpose(cotangents, *operands, masked, **params):
    del params
    constants, moves = operands[:-4], operands[-4:]
    inputs, rest = split_operands(constants, masked)
    (query, key, value, _), (lse, *_) = inputs, rest
    transpose = jax.linear_transpose(
        lambda *moves: formulas.curvature(*inputs, *rest, *moves), query, key, value, lse
    )
    gradients = transpose(tuple(_instantiated(cotangents)))
    wanted = [g if ad.is_undefined_primal(x) else None for g, x in zip(gradients, moves)]
    return [None] * len(constants) + wanted


ad.primitive_transposes[attention_curvature_p] = _attention_curvature_transpose


def _attention_tangent_transpose(cotangents, *operands, masked, **params):
    constants, linear = operands[:-3], operands[-3:]
    gradients = attention_backward_p.bind(
        *constants, *_instantiated(cotangents), masked=masked, **params
    )
    wanted = [g if ad.is_undefined_primal(x) else None for g, x in zip(gradients, linear)]
    return [None] * len(constants) + wanted


ad.primitive_transposes[attention_tangent_p] = _attention_tangent_transpose


def _with_tangent_partial_eval(trace, *tracers, masked, **params):
    """Evaluates known inputs at once, and their unknown tangents later."""
    params["masked"] = masked
    inputs, tangents = tracers[:-3], tracers[-3:]
    known = [tracer.pval.get_known() for tracer in inputs]
    if any(x is None for x in known) or all(x.is_known() for x in tangents):
        return trace.default_process_primitive(attention_with_tangent_p, tracers, params)
    output, lse = attention_p.bind(*known, **params)
    operands = (*inputs, trace.new_const(output), trace.new_const(lse), *tangents)
    return [output, lse, *trace.default_process_primitive(attention_tangent_p, operands, params)]


pe.custom_partial_eval_rules[attention_with_tangent_p] = _with_tangent_partial_eval


class _Split(NamedTuple):
    """An equation in two, in the order in which `pe.partial_eval_jaxpr_custom` takes them.

    Attributes:
      known: computed now, if anything is.
      later: computed when the unknown operands are there, if anything is.
      unknown: for each result, whether only `later` gives it.
      recomputed: for each result, whether `later` gives it (too).
      needed: variables that are kept for `later`.
    """

    known: JaxprEqn | None
    later: JaxprEqn | None
    unknown: list[bool]
    recomputed: list[bool]
    needed: list[Var]


# Of the results output, lse, d_output, d_lse.
_NO_RESULT, _TANGENTS, _ALL_RESULTS = [False] * 4, [False, False, True, True], [True] * 4


def _with_tangent_partial_eval_jaxpr(saveable, unknown, instantiated, equation):
    """The same for jaxprs, where a policy says what may be kept for the unknown part."""
    inputs, tangents = equation.invars[:-3], equation.invars[-3:]
    needed = _uninstantiated(equation.invars, instantiated)
    if not any(unknown):
        if _saved(saveable, attention_with_tangent_p, equation):
            return _Split(equation, None, _NO_RESULT, _NO_RESULT, [])
        return _Split(equation, equation, _NO_RESULT, _ALL_RESULTS, needed)
    if any(unknown[:-3]):
        return _Split(None, equation, _ALL_RESULTS, _ALL_RESULTS, needed)
    kept = [Var(x.aval) if isinstance(x, DropVar) else x for x in equation.outvars[:2]]
    first = equation.replace(primitive=attention_p, invars=inputs, outvars=kept)
    if not _saved(saveable, attention_p, first):
        return _Split(first, equation, _TANGENTS, _ALL_RESULTS, needed)
    second = equation.replace(
        primitive=attention_tangent_p,
        invars=[*inputs, *kept, *tangents],
        outvars=equation.outvars[2:],
    )
    return _Split(first, second, _TANGENTS, _TANGENTS, needed + kept)


def _saved(saveable, primitive, equation) -> bool:
    """Whether a policy of `jax.checkpoint` keeps an equation's results; offloading is not taken."""
    answer = saveable(primitive, *[x.aval for x in equation.invars], **equation.params)
    return answer is True or type(answer).__name__ == "SaveableType"


def _uninstantiated(variables, instantiated):
    return [x for x, there in zip(variables, instantiated) if isinstance(x, Var) and not there]


pe.partial_eval_jaxpr_custom_rules[attention_with_tangent_p] = _with_tangent_partial_eval_jaxpr


def _with_tangent_dead_code(used, equation):
    """Which operands are needed for the results that are used, and an equation for those alone."""
    inputs, tangents = equation.invars[:-3], equation.invars[-3:]
    if not any(used):
        return [False for _ in equation.invars], None
    if any(used[2:]):
        return [True for _ in equation.invars], equation
    without = equation.replace(primitive=attention_p, invars=inputs, outvars=equation.outvars[:2])
    return [True for _ in inputs] + [False for _ in tangents], without


pe.dce_rules[attention_with_tangent_p] = _with_tangent_dead_code
