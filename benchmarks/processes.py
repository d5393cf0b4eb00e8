"""Trains in several processes of this machine, kills one of them, starts all again, and compares
what they end with to the run of a single process.

    python benchmarks/processes.py [--processes=4] [--config=configs/teacher.py] [--set=key=value]

The run is small: a network of two blocks, trained by flow matching, drawn from and scored. One of
the processes dies by SIGKILL in the midst of training; how long the others take to end is measured.
One JSON line: `ratio` is the last loss over that of the single process, `parameters` the largest
relative difference of an averaged parameter.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from jax_distill.training.checkpoint import load_averaged

ROOT = Path(__file__).parents[1]
SMALL = {
    "total_steps": 16,
    "batch_size": 8,
    "log_every": 1,
    "checkpoint.every": 4,
    "model.num_layers": 1,
    "model.num_single_layers": 1,
    "model.num_attention_heads": 1,
    "data.examples": 64,
    "samples.prompts": 1,
    "samples.teacher_steps": 1,
    "evaluation.prompts": 6,
    "evaluation.diversity_prompts": 0,
    "evaluation.teacher_steps": 1,
}
KILLED_AFTER = 6  # steps
LIMIT = 1800.0  # seconds for each start

_PROCESSES = flags.DEFINE_integer("processes", 4, "How many.", 2)
_CONFIG = flags.DEFINE_string("config", "configs/teacher.py", "File of the configuration.")
_SET = flags.DEFINE_multi_string("set", [], "key=value of the configuration, over the small ones.")


def start(workdir: Path, count: int, log) -> list[subprocess.Popen]:
    """The processes of a run, which find each other on a free port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    settings = SMALL | dict(item.split("=", 1) for item in _SET.value)
    command = [sys.executable, "-m", "jax_distill.main", f"--config={_CONFIG.value}"]
    command += [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in settings.items())]
    command += [f"--coordinator_address=localhost:{port}", f"--num_processes={count}"]
    return [
        subprocess.Popen([*command, f"--process_id={index}"], cwd=ROOT, stdout=log, stderr=log)
        for index in range(count)
    ]


def wait(running: list[subprocess.Popen]) -> list[int]:
    """Exit codes, when all have ended; within the limit."""
    deadline = time.monotonic() + LIMIT
    try:
        return [process.wait(max(deadline - time.monotonic(), 1)) for process in running]
    finally:
        for process in running:
            process.kill()


def steps(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def kill_one(running: list[subprocess.Popen], workdir: Path) -> float:
    """Kills the last in the midst of training; the seconds that the others take to end."""
    deadline = time.monotonic() + LIMIT
    while steps(workdir) < KILLED_AFTER and time.monotonic() < deadline:
        if any(process.poll() is not None for process in running):
            break
        time.sleep(0.02)
    running[-1].kill()
    begun = time.monotonic()
    wait(running)
    return time.monotonic() - begun


def outcome(workdir: Path) -> tuple[float, list]:
    """The last loss, and the averaged parameters."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["loss"], jax.tree.leaves(load_averaged(workdir))


def main(argv):
    del argv
    logging.set_verbosity(logging.ERROR)
    count = _PROCESSES.value
    with tempfile.TemporaryDirectory() as folder:
        single, several = Path(folder, "single"), Path(folder, "several")
        with Path(folder, "log").open("w+") as log:
            seconds = kill_one(start(several, count, log), several)
            before = steps(several)
            print(f"one killed after {before} steps; all ended in {seconds:.1f} s", flush=True)
            for workdir, processes in ((several, count), (single, 1)):
                if any(wait(start(workdir, processes, log))):
                    log.seek(0)
                    sys.exit(f"the run of {processes} failed:\n{log.read()}")
                print(f"{processes}: done", flush=True)
        (loss, found), (reference, expected) = outcome(several), outcome(single)
    differences = [
        float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))
        for a, b in zip(found, expected)
    ]
    line = {
        "benchmark": "processes",
        "ratio": loss / reference,
        "reference": "the last loss of a single process",
        "processes": count,
        "killed_after": before,
        "end_time": seconds,
        "parameters": max(differences),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    app.run(main)
