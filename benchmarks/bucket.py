"""Runs everything in a bucket that fails now and then, and compares what comes out with a disk's.

    python benchmarks/bucket.py [--kills=2] [--faults=0.01] [--seed=0]

The store of objects is `tests/bucket_server.py` (`pip install 'jax-distill[test]'`): it is slow,
answers 503, cuts writes and reads off, and loses answers to writes, at a share of the requests.
The data, the teacher and the workdir of a run are in its bucket. The teacher is a short run too;
the student's run is killed by SIGKILL while it saves and while it trains, and started again; then a
picture is drawn and the student is exported into the bucket. The same is done on a disk, without
faults and kills. One JSON line tells whether parameters, averages, optimizer, input position,
metrics, scores, picture and exported files came out the same, bit for bit; `ratio` is the share of
numbers that did. Programs are compiled once, on the disk's turn.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import kill
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging

from jax_distill.storage import buckets, paths

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
TEACHER = {
    "total_steps": 4,
    "batch_size": 4,
    "log_every": 1,
    "checkpoint.every": 2,
    "samples.prompts": 1,
    "samples.teacher_steps": 1,
    "evaluation.prompts": 6,
    "evaluation.diversity_prompts": 0,
    "evaluation.teacher_steps": 1,
}
STUDENT = TEACHER | {
    "total_steps": 8,
    "rescale.total_steps": 4,
    "rescale.batch_size": 4,
    "evaluation.student_steps": 1,
}
PATIENCE = 1200.0  # seconds for a command

SMALL = {"model.num_layers": 1, "model.num_single_layers": 1}

flags.set_default(kill._KILLS, 2)
_FAULTS = flags.DEFINE_float("faults", 0.01, "Share of requests that go wrong.", 0, 0.5)


class Commands:
    """Commands of the package, whose data, teacher, workdir and outputs are in one place.

    Args:
      place: a folder or an address.
      environment: variables by which the store is found.
      log: takes what they print.
    """

    def __init__(self, place: Path, environment: Mapping[str, str], log):
        self.place, self._log = place, log
        self._environment = {**os.environ, **environment}

    def start(self, module: str, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"jax_distill.{module}", *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=self._environment, stdout=self._log, stderr=self._log
        )

    def run(self, module: str, *words: str) -> None:
        if self.start(module, *words).wait(PATIENCE):
            self._log.seek(0)
            sys.exit(f"{module} {' '.join(words)} failed:\n{self._log.read()}")

    def train(self, name: str, config: str, settings: Mapping[str, object]) -> list[str]:
        """The words of a training command."""
        settings = {**settings, "data.path": self.place / "data"}
        words = [f"--config.{key}={value}" for key, value in settings.items()]
        return [f"--config=configs/{config}.py", f"--workdir={self.place / name}", *words]

    def everything(self, kills: int = 0, rng: random.Random | None = None) -> int:
        """Data, teacher, student, picture, export; returns how often the student was killed."""
        self.run("prepare", f"--output={self.place / 'data'}", "--examples=32")
        self.run("main", *self.train("teacher", "teacher", TEACHER | SMALL))
        settings = STUDENT | {"teacher.checkpoint": self.place / "teacher"}
        words, killed = self.train("student", "scm", settings), 0
        for number in range(kills):
            killed += self._killed(words, saving=number % 2 == 0, rng=rng)
        self.run("main", *words)
        checkpoint = f"--checkpoint={self.place / 'student'}"
        drawn = f"--output={self.place / 'drawn.png'}"
        self.run("sample", checkpoint, "--prompt=a red circle", "--steps=1", drawn)
        exported = f"--output={self.place / 'exported'}"
        self.run("export", checkpoint, "--format=diffusers", exported)
        return killed

    def _killed(self, words: list[str], saving: bool, rng: random.Random) -> bool:
        """Starts the student's run and kills it; False if it was done before."""
        process, workdir = self.start("main", *words), self.place / "student"
        try:
            before, begun = commits(workdir), time.monotonic()
            while process.poll() is None and time.monotonic() - begun < PATIENCE:
                found = commits(workdir)
                if found[0] > before[0] and (not saving or found[1]):
                    time.sleep(0.0 if saving else rng.uniform(0, 1))
                    break
                time.sleep(0.2)
            return process.poll() is None
        finally:
            process.kill()
            process.wait()


def commits(workdir: Path) -> tuple[int, bool]:
    """The last step that is whole, and whether another is begun."""
    found = {}
    for path in buckets.objects(workdir / "checkpoints"):
        step, *rest = path.relative_to(workdir / "checkpoints").parts
        if step.isdigit():
            found[int(step)] = found.get(int(step), False) or rest == ["commit_success.txt"]
    whole = [step for step, committed in found.items() if committed]
    return max(whole, default=0), not all(found.values())


def outcome(place: Path) -> dict[str, np.ndarray]:
    """All that came out, as named arrays; paths of the place itself left out."""
    found = {}
    for name in ("teacher", "student", "student/time_rescale"):
        with buckets.on_disk(place / name / "checkpoints") as checkpoints:
            last = checkpoints / str(max(ocp.utils.checkpoint_steps(checkpoints)))
            state = ocp.PyTreeCheckpointHandler().restore(last / "state")
            for path, leaf in ocp.tree.to_flat_dict(state, sep="/").items():
                found[f"{name}/{path}"] = np.asarray(leaf)
            found[f"{name}/position"] = np.array((last / "data" / "metadata").read_text())
        text = (place / name / "metrics.jsonl").read_text()
        for line in map(json.loads, text.splitlines()):
            for key, value in line.items():
                if "time" not in key and "per_sec" not in key:
                    found[f"{name}/metrics/{line['step']}/{key}"] = np.array(value)
    for name in ("teacher", "student"):
        results = (place / name / "results.json").read_text().replace(str(place), "")
        found[f"{name}/results.json"] = np.array(results)
    found["drawn.png"] = np.array(hashlib.sha256((place / "drawn.png").read_bytes()).hexdigest())
    with buckets.on_disk(place / "exported") as folder:
        for path in sorted(folder.rglob("*.safetensors")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[f"exported/{path.relative_to(folder)}"] = np.array(content)
    return found


def main(argv):
    from bucket_server import BUCKET, BucketServer, Faults, environment

    del argv
    logging.set_verbosity(logging.ERROR)
    warnings.simplefilter("ignore")  # that arrays are read to where they were
    seed = flags.FLAGS.seed
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        began = time.monotonic()
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder, "compiled")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        disk = Commands(Path(folder), {}, log)
        disk.everything()
        on_disk = time.monotonic() - began
        with BucketServer(faults=Faults(_FAULTS.value, seed)) as server:
            os.environ.update(environment(server.port))
            place = paths.path(f"gs://{BUCKET}/all")
            bucket = Commands(place, environment(server.port), log)
            killed = bucket.everything(flags.FLAGS.kills, random.Random(seed))
            in_bucket = time.monotonic() - began - on_disk
            faults = dict(server.faults.seen)
            server.faults.share = 0.0
            total, equal = kill.same_numbers(outcome(place), outcome(disk.place))
            left = [str(path) for path in buckets.objects(place) if path.name.startswith(".")]
    line = {
        "benchmark": "bucket",
        "ratio": equal / total,
        "reference": "the numbers of the same runs on a disk, without faults and kills",
        "numbers": total,
        "kills": killed,
        "requests": sum(faults.values()),
        "faults": {name: count for name, count in faults.items() if name},
        "left_over": left,
        "bit_exact": equal == total,
        "seconds": round(in_bucket),
        "seconds_on_disk": round(on_disk),
        "seed": seed,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    app.run(main)
