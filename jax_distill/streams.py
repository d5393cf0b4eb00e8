"""Random streams: seeds, the keys that all noise comes from, and JAX's settings that they need.

What is drawn depends on the seed alone, not on what a user has set in JAX: keys are made here,
of a stated kind, and programs are traced within `default_settings`.
"""

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_SEED = 2**32 - 1
"""The largest seed: one word of a key of Threefry's, whose other word is zero."""

_DEFAULTS = {
    # Which bits a key gives.
    "threefry_partitionable": True,
    "default_prng_impl": "threefry2x32",
    "legacy_prng_key": "allow",
    # The types and the precision that numbers are computed in.
    "enable_x64": False,
    "default_matmul_precision": None,
    # Settings that refuse programs, or run them one operation at a time, rounded otherwise.
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
    "disable_jit": False,
}


@contextlib.contextmanager
def default_settings() -> Iterator[list[str]]:
    """A context in which JAX's settings that change numbers have their defaults.

    It touches those alone that have another value; the user's settings are as before after it.

    Yields:
      The settings that it changed, such as "jax_enable_x64".
    """
    changed = []
    with contextlib.ExitStack() as stack:
        for name, default in _DEFAULTS.items():
            if getattr(jax.config, f"jax_{name}", default) != default:
                stack.enter_context(getattr(jax, name)(default))
                changed.append(f"jax_{name}")
        yield changed


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as an int, whichever type of whole numbers it has.

    Raises:
      ValueError: it is of another type, or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name}: {value!r} is not a whole number")
    if number < least:
        raise ValueError(f"{name}: {number} is not at least {least}")
    if most is not None and number > most:
        raise ValueError(f"{name}: {number} is more than {most}; give a smaller number")
    return number


def check_seed(seed: Any, name: str = "seed") -> int:
    """The seed as an int.

    Raises:
      ValueError: it is no whole number from 0 to `MOST_SEED`.
    """
    return whole_number(name, seed, 0, MOST_SEED)


def key(seed: Any) -> jax.Array:
    """The key of a seed: that of `jax.random.key` where JAX has its default settings.

    Args:
      seed: a whole number; or () uint32, which may be traced.

    Raises:
      ValueError: it is no seed.
    """
    if not isinstance(seed, jax.Array):
        seed = np.uint32(check_seed(seed))
    low = jnp.asarray(seed, jnp.uint32)
    return jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(low), low]), impl="threefry2x32")
