"""Arithmetic of a function, counted from its jaxpr: exact, and before any compiler."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from jax_distill.ops.attention import rules


def count_flops(fn: Callable, *args: Any, undecided: Callable[[list[int]], int] = max) -> int:
    """Floating point operations of the matrix products and convolutions in `fn(*args)`.

    A multiplication and an addition count as two. A scan counts its body once a step, unlike XLA's
    `cost_analysis`; a `cond` counts the branch that is taken where a constant decides, and else
    `undecided` of all; a rematerialised block counts each time it is run. What does not reach an
    output is left out, as compilers do, but equal computations that are written twice count twice.
    Element-wise operations count nothing. Attention counts the products that its formulas have,
    whatever computes it.

    Args:
      fn: any function of pytrees of arrays that JAX can trace; it is not run.
      *args: its arguments; `jax.ShapeDtypeStruct` leaves do.
      undecided: of the counts of a cond's branches: the most expensive one's, or such as
        `statistics.mean` where draws decide and none is likelier.

    Returns:
      The number, as an exact Python integer.

    Raises:
      ValueError: products within a primitive whose repetitions the jaxpr does not tell, such as a
        `while_loop`.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return int(_flops(used, undecided))


def _flops(jaxpr: core.Jaxpr, undecided: Callable) -> int:
    return sum(_equation_flops(equation, undecided) for equation in jaxpr.eqns)


def _equation_flops(equation: core.JaxprEqn, undecided: Callable) -> int:
    name, params = equation.primitive.name, equation.params
    attention = rules.flops(equation)
    if attention is not None:
        return attention
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // outputs
    inner = [_flops(jaxpr, undecided) for jaxpr in _jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        chosen = equation.invars[0]
        return inner[int(chosen.val)] if isinstance(chosen, core.Literal) else undecided(inner)
    if name in ("while", "pallas_call", "shard_map") and any(inner):
        raise ValueError(f"count_flops: products within a '{name}', whose repetitions are unknown")
    return sum(inner)


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _jaxprs(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
