"""Kills `prepare` again and again, and on several processes, and compares what it ends with.

    python benchmarks/prepare_kill.py [--kills=10] [--processes=1,2,4] [--examples=1500] [--seed=0]
        [--flags=--teacher=embedded --steps=1] [--bucket --faults=0.01]

Every folder is made in small shards. One is made in one go, one by a process that dies by SIGKILL
at random moments and is started again with the same command, and one each by several processes, of
which one is killed half way. One JSON line: `ratio` is the share of files that are byte for byte
those that were made in one go. With --bucket all but that one are made in a bucket that fails.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import starting
from absl import app, flags

from jax_distill.data.manifest import DESCRIPTION
from jax_distill.storage import contents, paths
from jax_distill.storage.files import UNFINISHED

ROOT = Path(__file__).parents[1]
SHARD_RECORDS = 64
PROGRAM = f"""
from jax_distill.data import drawing, shards
shards.SHARD_RECORDS = {SHARD_RECORDS}
drawing.DRAWN_BATCH = 60
from jax_distill import prepare
from jax_distill.runs import commands
commands.run(prepare.main)
"""
LIMIT = 3000.0  # seconds for each start

_KILLS = flags.DEFINE_integer("kills", 10, "How often.", 0)
_PROCESSES = flags.DEFINE_list("processes", ["1", "2", "4"], "Numbers of processes.")
_EXAMPLES = flags.DEFINE_integer("examples", 1500, "How many.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_BUCKET = flags.DEFINE_bool("bucket", False, "Make them in a bucket; see benchmarks/bucket.py.")
_FAULTS = flags.DEFINE_float("faults", 0.01, "Share of the bucket's requests that go wrong.", 0, 1)
_FLAGS = flags.DEFINE_string("flags", "", "Others of prepare, such as --teacher=embedded.")


def start(output: Path, log, count: int = 1) -> list[subprocess.Popen]:
    """The processes of one command, which find each other on a free port."""
    command = [sys.executable, "-c", PROGRAM, f"--output={output}"]
    command += [f"--examples={_EXAMPLES.value}", *_FLAGS.value.split()]
    return starting.start(command, log, count)


def shards_of(output: Path) -> int:
    """The shards that are done so far."""
    unfinished = output
    if not paths.is_bucket(output):
        unfinished = output.with_name(f".{output.name}.unfinished")
    return sum(path.suffix == ".array_record" for path in contents.files(unfinished))


def kill(
    running: list[subprocess.Popen], output: Path, delay: float, shards: int, later: float = 0.0
) -> bool:
    """Kills the last process; False when it had ended before.

    It is killed after a delay in seconds, or a little later than so many more shards are done, if
    that is sooner.
    """
    begun, before = time.monotonic(), shards_of(output)
    while time.monotonic() - begun < delay and shards_of(output) < before + shards:
        if running[-1].poll() is not None:
            break
        time.sleep(0.2 if paths.is_bucket(output) else 0.002)
    time.sleep(later)
    alive = running[-1].poll() is None
    running[-1].kill()
    return alive


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in contents.files(folder)}


def whole(folder: Path) -> bool:
    return (folder / DESCRIPTION).exists() and not (folder / UNFINISHED).exists()


@contextlib.contextmanager
def place(disk: Path) -> Iterator[Path]:
    """Where folders are made: on a disk, or in a bucket that fails now and then."""
    if not _BUCKET.value:
        yield disk
        return
    sys.path.append(str(ROOT / "tests"))
    from bucket_server import BUCKET, BucketServer, Faults, environment

    with BucketServer(faults=Faults(_FAULTS.value, _SEED.value)) as server:
        os.environ.update(environment(server.port))
        yield paths.path(f"gs://{BUCKET}/prepared")
        print(f"requests: {dict(server.faults.seen)}", flush=True)


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as disk, place(Path(disk)) as root:
        line = measure(Path(disk), root)
    print(json.dumps(line))
    sys.exit(line["ratio"] < 1 or bool(line["left"]))


def measure(disk: Path, root: Path) -> dict:
    """All that is measured.

    Args:
      disk: where the folder that the others are compared with is made, in one go.
      root: where the others are.
    """
    rng, kills, seconds = random.Random(_SEED.value), 0, {}
    made = {}
    with Path(disk, "log").open("w+") as log:

        def finish(name: str, count: int = 1, root: Path = root) -> None:
            begun = time.monotonic()
            if not whole(root / name) and any(starting.wait(start(root / name, log, count), LIMIT)):
                log.seek(0)
                sys.exit(f"{name} failed:\n{log.read()}")
            seconds[name], made[name] = time.monotonic() - begun, content(root / name)
            print(f"{name}: {len(made[name])} files, {seconds[name]:.1f} s", flush=True)

        finish("whole", root=disk)
        for number in range(_KILLS.value):
            output = root / "killed"
            running = start(output, log)
            # Every third dies while it starts, before anything or between what was done.
            delay = rng.uniform(0, 8) if number % 3 == 0 else LIMIT
            kills += kill(running, output, delay, rng.randint(1, 3), rng.uniform(0, 0.2))
            starting.wait(running, LIMIT)
            print(f"kill {number + 1}: {shards_of(output)} shards done", flush=True)
            if whole(output):
                break
        if _KILLS.value:
            finish("killed")
        for count in map(int, _PROCESSES.value):
            name = f"on {count}"
            if count > 1:
                running = start(root / name, log, count)
                kills += kill(running, root / name, LIMIT, 3)
                codes = starting.wait(running, LIMIT)
                if not all(codes):
                    sys.exit(f"a process went on without the one that was killed: {codes}")
            finish(name, count)
    one = made["whole"]
    names = [(key, name) for key, found in made.items() for name in found.keys() | one.keys()]
    same = sum(made[key].get(name) == one.get(name) for key, name in names)
    every = contents.files(root) if paths.is_bucket(root) else root.iterdir()
    return {
        "benchmark": "prepare_kill",
        "ratio": same / len(names),
        "reference": "the files that were made in one go on a disk",
        "files": len(one),
        "kills": kills,
        "left": [path.name for path in every if path.name.startswith(".")],
        "bucket": _BUCKET.value,
        "seed": _SEED.value,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


if __name__ == "__main__":
    app.run(main)
