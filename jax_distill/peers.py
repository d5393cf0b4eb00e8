"""A process of several that is lost ends the others with one sentence."""

import os
import re

import jax

from jax_distill import disks

LOST = (
    "error: a process of this run was lost, or failed, and this one ends with it; when all have"
    " ended, run the same command to go on"
)
_SIGNS = re.compile(
    r"CoordinationService|heartbeat|Gloo|Barrier failed|UNAVAILABLE|DEADLINE_EXCEEDED"
    r"|[Cc]onnection (?:reset|closed|refused)|Broken pipe|Socket closed|preempted"
)


def end_if_lost(error: Exception) -> None:
    """Ends this one of several processes, if the error comes of another that is lost."""
    if jax.distributed.is_initialized() and is_of_lost(error):
        os.write(2, f"{LOST}\n".encode())
        os._exit(1)


def is_of_lost(error: Exception) -> bool:
    """Whether JAX raised an error because another process did not answer."""
    return any(
        isinstance(found, jax.errors.JaxRuntimeError) and _SIGNS.search(str(found))
        for found in disks.chain(error)
    )
