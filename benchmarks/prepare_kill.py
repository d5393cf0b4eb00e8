"""Kills `prepare` again and again, and on several processes, and compares what it ends with.

    python benchmarks/prepare_kill.py [--kills=10] [--processes=1,2,4] [--examples=1500] [--seed=0]
        [--flags=--teacher=embedded --steps=1]

Every folder is made in small shards. One is made in one go, one by a process that dies by SIGKILL
at random moments and is started again with the same command, and one each by several processes, of
which one is killed half way. One JSON line: `ratio` is the share of files that are byte for byte
those that were made in one go.
"""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

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
_FLAGS = flags.DEFINE_string("flags", "", "Others of prepare, such as --teacher=embedded.")


def start(output: Path, log, count: int = 1) -> list[subprocess.Popen]:
    """The processes of one command, which find each other on a free port."""
    command = [sys.executable, "-c", PROGRAM, f"--output={output}"]
    command += [f"--examples={_EXAMPLES.value}", *_FLAGS.value.split()]
    if count > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        command += [f"--num_processes={count}", f"--coordinator_address=localhost:{port}"]
        command += ["--heartbeat_timeout_seconds=10"]
    each = [f"--process_id={index}" for index in range(count)] if count > 1 else [""]
    environment = {"PYTHONPATH": str(ROOT), **os.environ}
    return [
        subprocess.Popen(
            [*command, *filter(None, [own])], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        for own in each
    ]


def wait(running: list[subprocess.Popen]) -> list[int]:
    """Exit codes, when all have ended; within the limit."""
    deadline = time.monotonic() + LIMIT
    try:
        return [process.wait(max(deadline - time.monotonic(), 1)) for process in running]
    finally:
        for process in running:
            process.kill()


def shards_of(output: Path) -> int:
    """The shards that are done so far."""
    unfinished = output.with_name(f".{output.name}.unfinished")
    return len(list(unfinished.glob("*.array_record")))


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
        time.sleep(0.002)
    time.sleep(later)
    alive = running[-1].poll() is None
    running[-1].kill()
    return alive


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def main(argv: list[str]) -> None:
    del argv
    rng, kills, seconds = random.Random(_SEED.value), 0, {}
    with tempfile.TemporaryDirectory() as root:
        made, log = {}, Path(root, "log").open("w+")

        def finish(name: str, count: int = 1) -> None:
            begun = time.monotonic()
            if not Path(root, name).exists() and any(wait(start(Path(root, name), log, count))):
                log.seek(0)
                sys.exit(f"{name} failed:\n{log.read()}")
            seconds[name], made[name] = time.monotonic() - begun, content(Path(root, name))
            print(f"{name}: {len(made[name])} files, {seconds[name]:.1f} s", flush=True)

        finish("whole")
        for number in range(_KILLS.value):
            output = Path(root, "killed")
            running = start(output, log)
            # Every third dies while it starts, before anything or between what was done.
            delay = rng.uniform(0, 8) if number % 3 == 0 else LIMIT
            kills += kill(running, output, delay, rng.randint(1, 3), rng.uniform(0, 0.2))
            wait(running)
            print(f"kill {number + 1}: {shards_of(output)} shards done", flush=True)
            if output.exists():
                break
        if _KILLS.value:
            finish("killed")
        for count in map(int, _PROCESSES.value):
            name = f"on {count}"
            if count > 1:
                running = start(Path(root, name), log, count)
                kills += kill(running, Path(root, name), LIMIT, 3)
                codes = wait(running)
                if not all(codes):
                    sys.exit(f"a process went on without the one that was killed: {codes}")
            finish(name, count)
        log.close()
        whole = made["whole"]
        names = [(key, name) for key, found in made.items() for name in found.keys() | whole.keys()]
        same = sum(made[key].get(name) == whole.get(name) for key, name in names)
        partial = [path.name for path in Path(root).iterdir() if path.name.startswith(".")]
    line = {
        "benchmark": "prepare_kill",
        "ratio": same / len(names),
        "reference": "the files that were made in one go",
        "files": len(whole),
        "kills": kills,
        "left": partial,
        "seed": _SEED.value,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    print(json.dumps(line))
    sys.exit(same < len(names) or bool(partial))


if __name__ == "__main__":
    app.run(main)
