"""Counts the processes that a cluster has started for a run, as the cluster and JAX report them.

JAX's detection is not public, and finds nothing where a variable that it waits for is missing. The
variables that launchers set are a second opinion: a process that is one of several and goes on
alone would train the same run beside the others, in their workdir.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TPU_DEVICES = ("accel[0-9]*", "vfio/[0-9]*")  # below /dev, of a TPU VM


def count(variables: Mapping[str, str] | None = None) -> int:
    """The number of processes: 1, or as many as JAX finds too.

    Args:
      variables: of the environment; the process's by default.

    Raises:
      ValueError: a launcher's variable is no number; or there are, or may be, other processes, and
        JAX does not find them.
    """
    told = _told(os.environ if variables is None else variables)
    failure, changed = "", False
    try:
        found = _found()
    except Exception as error:  # any: it reads variables, queries servers, and is not public
        found = 1
        failure = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        changed = isinstance(error, ImportError | AttributeError | TypeError)
    fix = (
        "give --coordinator_address=HOST:PORT, --num_processes and --process_id, or"
        " --num_processes=1 to run alone"
    )
    if found == 1 and told:
        what = f"JAX's detection fails ({failure})" if failure else "JAX finds no others"
        raise ValueError(f"{told} says that this is one of several processes, and {what}; {fix}")
    if failure and (not changed or _on_tpu()):
        raise ValueError(f"JAX cannot tell how many processes there are ({failure}); {fix}")
    return found


def _found() -> int:
    """The number of processes that JAX's own detection finds; 1 where it finds no cluster.

    `jax.distributed.initialize` would wait for minutes for a name that single hosts with a TPU,
    such as notebooks, do not have.
    """
    from jax._src import clusters  # not public: another JAX may not have it

    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    return int(detect("not asked", None, 0, [0], None, None)[1] or 1)


def _on_tpu() -> bool:
    return any(any(Path("/dev").glob(pattern)) for pattern in TPU_DEVICES)


class _Launcher(NamedTuple):
    """Variables of a launcher: the first one that is set counts.

    Attributes:
      counts: with functions that read the number of processes.
      rank: of the process, from 0; tells of others where nothing counts them.
      given: of which one must be set, or the rank be above 0, for the launcher to have a say.
    """

    counts: Mapping[str, Callable[[str], int]]
    rank: str | None
    given: Sequence[str] = ()


def _product(text: str) -> int:
    return math.prod(int(part) for part in text.split(","))


def _names(text: str) -> int:
    return sum(bool(name.strip()) for name in text.split(","))


_LAUNCHERS = (
    # A batch script has SLURM_NTASKS too, and rank 0, but is no step: it runs once.
    _Launcher(
        {"SLURM_STEP_NUM_TASKS": int, "SLURM_NTASKS": int},
        "SLURM_PROCID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),
    ),
    _Launcher({"OMPI_COMM_WORLD_SIZE": int}, "OMPI_COMM_WORLD_RANK"),
    _Launcher({"PMI_SIZE": int}, "PMI_RANK"),  # MPICH, Intel MPI
    _Launcher({"MV2_COMM_WORLD_SIZE": int}, "MV2_COMM_WORLD_RANK"),
    _Launcher({}, "PMIX_RANK"),
    _Launcher({"TPU_PROCESS_ADDRESSES": _names}, "CLOUD_TPU_TASK_ID"),
    _Launcher({"TPU_WORKER_HOSTNAMES": _names}, "TPU_WORKER_ID"),
    _Launcher({"TPU_PROCESS_BOUNDS": _product, "TPU_HOST_BOUNDS": _product}, None),
    _Launcher({"MEGASCALE_NUM_SLICES": int}, "MEGASCALE_SLICE_ID"),
)


def _told(variables: Mapping[str, str]) -> str | None:
    """The variable, with its value, that announces several processes, if one does.

    Raises:
      ValueError: it is no number.
    """
    for counts, rank, given in _LAUNCHERS:
        read = {**counts, rank: lambda text: int(text) + 1} if rank else counts
        if given and not any(map(variables.get, given)) and not _positive(variables, rank, int):
            continue
        for name, number in read.items():
            if _value(variables, name):
                if _positive(variables, name, number) > 1:
                    return f"{name}={variables[name]}"
                break
    return None


def _value(variables: Mapping[str, str], name: str) -> str:
    """The value of a variable; empty where it is not set.

    Empty, too, for libtpu's warning (with a comma), which it puts there where there is no TPU.
    """
    text = variables.get(name, "")
    return "" if "TPU" in name and text.startswith("WARNING") else text


def _positive(variables: Mapping[str, str], name: str, read: Callable[[str], int]) -> int:
    """The number in a variable; 0 where it is not set."""
    text = _value(variables, name)
    try:
        number = read(text) if text else 0
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(f"{name}: {text!r} is not a number of processes; unset it or mend it")
    return number
