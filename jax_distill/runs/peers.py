"""A process of several that is lost ends the others with one sentence."""

import os
import re

import jax

from jax_distill.devices import lost_report
from jax_distill.storage import disks

_SIGNS = re.compile(
    r"CoordinationService|heartbeat|Gloo|Barrier failed|UNAVAILABLE|DEADLINE_EXCEEDED"
    r"|[Cc]onnection (?:reset|closed|refused)|Broken pipe|Socket closed|preempted"
)
_STATUS = re.compile(r"[A-Z]+(?:_[A-Z]+)*: ")


def end_if_lost(error: Exception) -> None:
    """Ends this one of several processes, if the error comes of another that is lost."""
    if jax.distributed.is_initialized() and is_of_lost(error):
        os.write(2, f"{lost_report.LOST}\n".encode())
        os._exit(1)


def is_of_lost(error: Exception) -> bool:
    """Whether JAX raised an error because another process did not answer."""
    return any(_of_jax(found) and _SIGNS.search(str(found)) for found in disks.chain(error))


def _of_jax(error: BaseException) -> bool:
    """Whether XLA raised it: ValueErrors of a program that is called begin with their status."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    return type(error) is ValueError and _STATUS.match(str(error)) is not None
