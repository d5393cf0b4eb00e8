"""Starts the processes of one command, for the benchmarks that kill some of them."""

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(command: Sequence[str], log, count: int = 1) -> list[subprocess.Popen]:
    """The processes of one command, which find each other on a free port.

    Args:
      command: of this package, as one process is started.
      log: a file that gets what they print.
      count: of processes.
    """
    command, each = list(command), [[]]
    if count > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        command += [f"--num_processes={count}", f"--coordinator_address=localhost:{port}"]
        command += ["--heartbeat_timeout_seconds=10"]
        each = [[f"--process_id={index}"] for index in range(count)]
    environment = {"PYTHONPATH": str(ROOT), **os.environ}
    return [
        subprocess.Popen([*command, *own], cwd=ROOT, env=environment, stdout=log, stderr=log)
        for own in each
    ]


def wait(running: Sequence[subprocess.Popen], seconds: float) -> list[int]:
    """Exit codes, when all have ended; raises TimeoutExpired after so many seconds."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(deadline - time.monotonic(), 1)) for process in running]
    finally:
        for process in running:
            process.kill()
