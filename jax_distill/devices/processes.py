"""Runs of several processes: how they find each other, wait for each other and agree.

All run the same program on the same configuration and see the same workdir. Each holds the devices
of its host; computations on the mesh are done by all together. The first, the leader, is the only
one that writes files, but for checkpoints, of which each writes its own share.
"""

import itertools
import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging
from jax.experimental import multihost_utils

from jax_distill.devices import clusters, lost_report

T = TypeVar("T")

_barriers = itertools.count()
_sync_points = itertools.count()
_YEAR = 365 * 24 * 3600


def define_flags() -> None:
    """Defines the flags that `join` reads, for commands that may be one of several processes."""
    if "coordinator_address" in flags.FLAGS:  # where one program imports several commands
        return
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of process 0, for a run of several processes; or JAX_COORDINATOR_ADDRESS. On TPU"
        " pods, under Slurm and under Open MPI it is found, as are the next two.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many there are; or JAX_NUM_PROCESSES. 1: do not look.", 1
    )
    flags.DEFINE_integer(
        "process_id", None, "Which of them this one is, from 0; or JAX_PROCESS_ID.", 0
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_seconds",
        100,
        "A process that gives no sign for so long is taken for dead, and the others end.",
        1,
    )


def join() -> None:
    """Joins the other processes of this run, if there are any; before a device is touched.

    They are named by flags, by environment variables, or by what `jax.distributed` can find out:
    a TPU pod, Slurm, Open MPI.

    Raises:
      ValueError: they are not named, or not consistently; or they do not come.
    """
    if not several():
        return
    address, count, index = _named()
    if index is not None and (index < 0 or count is not None and index >= count):
        raise ValueError(f"--process_id: {index} is none of {count or 'the'} processes, from 0")
    timeout = flags.FLAGS.heartbeat_timeout_seconds
    lost_report.shorten()
    try:
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=timeout)
    except Exception as error:  # of any kind: it reads a cluster's variables, and asks its servers
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{lost_report.APART} ({reason}); {lost_report.ADVICE}") from None
    if not is_leader():
        logging.set_verbosity(logging.WARNING)


def several() -> bool:
    """Whether this is one of several processes, which `join` would join; touches no device.

    Raises:
      ValueError: an environment variable is no number.
    """
    named = _named()
    return named[1] != 1 and (named != (None, None, None) or clusters.count() > 1)


def _named() -> tuple[str | None, int | None, int | None]:
    """Address, number and index, as flags and environment variables give them."""
    return (
        flags.FLAGS.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS") or None,
        _number(flags.FLAGS.num_processes, "JAX_NUM_PROCESSES"),
        _number(flags.FLAGS.process_id, "JAX_PROCESS_ID"),
    )


def _number(flag: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if flag is not None or not text:
        return flag
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{variable}: {text!r} is not a whole number") from None


def joined() -> bool:
    """Whether this is one of several processes; touches no device."""
    return jax.distributed.is_initialized()


def is_leader() -> bool:
    """Whether this process writes logs, pictures and results."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Returns when all processes are here, however long one of them takes."""
    barrier = ocp.multihost.get_barrier_sync_fn()
    barrier(key=f"{what} {next(_barriers)}", timeout_ms=1000 * _YEAR)


def leader_first(make: Callable[[], T], what: str) -> T:
    """Calls `make` on the leader first, then on the others, which find its files."""
    if is_leader():
        made = make()
        wait(what)
        return made
    wait(what)
    return make()


def agreed(value: bool) -> bool:
    """The leader's value, on each process."""
    if not joined():
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


class Share(NamedTuple):
    """The part of this process in work that several do on the same files."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process does what one alone does."""
        return self.index == 0

    def wait(self, what: str) -> None:
        """Returns when all of them are here."""
        if self.count > 1:
            wait(what)

    def any(self, value: bool) -> bool:
        """Whether one of them says so; all hear the same."""
        if self.count == 1:
            return value
        return bool(multihost_utils.process_allgather(np.asarray(value)).any())

    def first(self, act: Callable[[], None], what: str) -> None:
        """The first acts while the others wait; what it refuses, all of them refuse.

        Args:
          act: may raise ValueError.
          what: begins the message of the others.

        Raises:
          ValueError: as `act`.
        """
        refused = None
        if self.leads:
            try:
                act()
            except ValueError as error:
                refused = error
        if self.count > 1 and not agreed(refused is None):
            raise refused or ValueError(f"{what} is refused, as process 0 says")
        if refused is not None:
            raise refused


ALONE = Share()


def share() -> Share:
    """The part of this process in what all that have joined do."""
    return Share(jax.process_index(), jax.process_count()) if joined() else ALONE


def preempted() -> bool:
    """Whether to save and stop now; every process asks after every step, and all hear the same.

    If one has received SIGTERM, all hear it after the step that the one furthest ahead is in.
    """
    return multihost_utils.reached_preemption_sync_point(next(_sync_points))
