"""Kills a training run again and again, and compares what it ends with to an uninterrupted run.

    python benchmarks/kill.py [--kills=10] [--seed=0] [--config=configs/scm.py] [--set=key=value]

The run is small: the bundled teacher, a handful of examples and steps, both stages. It dies by
SIGKILL while it starts, between steps, and while a checkpoint is being written; every time it is
started again with the same command. One JSON line tells whether parameters, averages, optimizer,
input position, metrics and scores came out the same, bit for bit; `ratio` is the share of numbers
that did. With JAX_COMPILATION_CACHE_DIR set, restarts do not compile again.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging

ROOT = Path(__file__).parents[1]
SMALL = {
    "total_steps": 24,
    "batch_size": 4,
    "log_every": 1,
    "checkpoint.every": 2,
    "rescale.total_steps": 8,
    "rescale.batch_size": 4,
    "data.examples": 64,
    "samples.prompts": 1,
    "samples.teacher_steps": 1,
    "evaluation.prompts": 6,
    "evaluation.diversity_prompts": 0,
    "evaluation.student_steps": 1,
    "evaluation.teacher_steps": 1,
}
STARTING = 20.0  # seconds in which a process dies that is to die while it starts

_KILLS = flags.DEFINE_integer("kills", 10, "How often.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_CONFIG = flags.DEFINE_string("config", "configs/scm.py", "File of the configuration.")
_SET = flags.DEFINE_multi_string("set", [], "key=value of the configuration, over the small ones.")


def start(workdir: Path, log) -> subprocess.Popen:
    settings = SMALL | dict(item.split("=", 1) for item in _SET.value)
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "jax_distill.main", f"--config={_CONFIG.value}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *overrides], cwd=ROOT, stdout=log, stderr=log
    )


def stages(workdir: Path) -> list[Path]:
    """The folders that hold the run's stages."""
    return [p.parent for pattern in ("config.json", "*/config.json") for p in workdir.glob(pattern)]


def half_written(workdir: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process died."""
    folders = [stage / "checkpoints" for stage in stages(workdir)]
    names = [name for folder in folders if folder.is_dir() for name in os.listdir(folder)]
    return any(".orbax-checkpoint-tmp" in name for name in names)


def lines(workdir: Path) -> int:
    """Steps logged so far, over all stages."""
    paths = [stage / "metrics.jsonl" for stage in stages(workdir)]
    return sum(len(path.read_bytes().splitlines()) for path in paths if path.exists())


def kill(process: subprocess.Popen, workdir: Path, moment: str, rng: random.Random) -> bool:
    """Waits for the moment and kills the process; False when it was done before."""
    begun, logged = time.monotonic(), lines(workdir)
    delay, steps = rng.uniform(0, STARTING), rng.randint(1, 3)
    try:
        while process.poll() is None:
            if moment == "starting" and time.monotonic() - begun > delay:
                break
            if moment == "saving" and half_written(workdir) and lines(workdir) > logged:
                break
            if moment == "training" and lines(workdir) >= logged + steps:
                time.sleep(rng.uniform(0, 0.3))
                break
            time.sleep(0.002)
        return process.poll() is None
    finally:
        process.kill()
        process.wait()


def outcome(workdir: Path) -> dict[str, np.ndarray]:
    """All that a run ends with, as named arrays."""
    found = {}
    for folder in stages(workdir):
        stage, checkpoints = folder.relative_to(workdir), folder / "checkpoints"
        last = checkpoints / str(max(ocp.utils.checkpoint_steps(checkpoints)))
        state = ocp.PyTreeCheckpointHandler().restore(last / "state")
        for path, leaf in ocp.tree.to_flat_dict(state, sep="/").items():
            found[f"{stage}/{path}"] = np.asarray(leaf)
        found[f"{stage}/position"] = np.array((last / "data" / "metadata").read_text())
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
            for name, value in line.items():
                if "time" not in name and "per_sec" not in name:
                    found[f"{stage}/metrics/{line['step']}/{name}"] = np.array(value)
    found["results.json"] = np.array((workdir / "results.json").read_text())
    return found


def same_numbers(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[int, int]:
    """How many numbers there are in either, and how many are the same in both."""
    total = equal = 0
    for name in a.keys() | b.keys():
        x, y = (side.get(name, np.empty(0)) for side in (a, b))
        total += max(x.size, y.size)
        if x.shape == y.shape and x.dtype == y.dtype:
            equal += int(np.sum((x == y) | ((x != x) & (y != y))))
    return total, equal


def main(argv):
    del argv
    logging.set_verbosity(logging.ERROR)
    warnings.simplefilter("ignore")  # that arrays are read to where they were
    rng = random.Random(_SEED.value)
    moments = [("saving", "training", "starting", "training")[i % 4] for i in range(_KILLS.value)]
    rng.shuffle(moments)
    kills = during_save = 0
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        with Path(folder, "log").open("w+") as log:
            for moment in moments:
                if not kill(start(killed, log), killed, moment, rng):
                    break
                kills += 1
                during_save += moment != "starting" and half_written(killed)
                print(f"kill {kills}: {moment}, {lines(killed)} steps logged", flush=True)
            for workdir in (killed, whole):
                if start(workdir, log).wait() != 0:
                    log.seek(0)
                    sys.exit(f"{workdir.name} run failed:\n{log.read()}")
        total, equal = same_numbers(outcome(killed), outcome(whole))
    line = {
        "benchmark": "kill",
        "ratio": equal / total,
        "reference": "the numbers of an uninterrupted run",
        "numbers": total,
        "kills": kills,
        "during_save": during_save,
        "bit_exact": equal == total,
        "seed": _SEED.value,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    app.run(main)
