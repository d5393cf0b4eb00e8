"""Tells whether a process of this host is alive, and still the same one."""

import os
import time
from pathlib import Path


def is_alive(pid: int, started: str = "") -> bool:
    """Whether a process of this host is there, and is the one that started then, if that is given.

    A zombie, which has ended without its parent's notice, is not there.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    found = process_started(pid)
    if found is None:
        return not Path("/proc/self/stat").exists()  # on systems that have no such files
    return not started or found == started


def process_started(pid: int) -> str | None:
    """Start time of a process, in ticks since its machine's; None where it is not known, or where
    the process has ended."""
    try:
        # The name before them is in brackets and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def started_after(pid: int, moment: float) -> bool:
    """Whether a process started after a moment (seconds since the epoch); False if not known."""
    ticks = process_started(pid)
    if ticks is None:
        return False
    machine = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return machine + int(ticks) / os.sysconf("SC_CLK_TCK") > moment + 1
