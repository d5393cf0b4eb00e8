"""Faults that commands survive: kills, passing errors, a full disk, a second run.

    python benchmarks/faults.py [--only=kills,errors,full,two] [--seed=0]

kills   each of prepare, export and port dies by SIGKILL twelve times, while it starts or writes,
        and is started again with the same command: the share of kills after which what it made was
        bit for bit that of a command left alone, with nothing left beside it.
errors  reading the newest checkpoint fails with six errors of the system, twice and then no more,
        or always, by a library that is loaded before others (needs gcc): the share of tries after
        which the run went on from it, bit for bit, at once or when it could be read again.
full    the disk is full at five moments of a run (a small tmpfs: needs root): the share of them in
        which the run ended with one sentence and went on bit for bit when there was room.
two     a second run is started in a workdir ten times, at random moments of the first: the share of
        tries in which it was refused with one sentence and the first ended bit for bit as alone.

One JSON line each. `benchmarks/kill.py` does the same for a training run. Set
JAX_COMPILATION_CACHE_DIR, or every start compiles anew.
"""

import contextlib
import errno
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging
from kill import ROOT, lines, outcome, same_numbers

from jax_distill.interop.orbax_tree import open_tree

sys.path.insert(0, str(ROOT / "tests"))

PARTS = ("kills", "errors", "full", "two")
LIMIT = 600.0  # seconds for each command
SMALL = {
    "total_steps": 24,
    "batch_size": 2,
    "log_every": 2,
    "checkpoint.every": 4,
    "data.examples": 64,
    "samples.prompts": 1,
    "samples.teacher_steps": 1,
    "model.num_layers": 1,
    "model.num_single_layers": 1,
    "model.num_attention_heads": 1,
    "evaluation.prompts": 12,
    "evaluation.diversity_prompts": 0,
    "evaluation.teacher_steps": 1,
}
ERRORS = ("EIO", "EACCES", "EMFILE", "ESTALE", "ENOMEM", "ETIMEDOUT")
FAILING_READS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* Opening files whose path has $FAULT_PATH in it fails with $FAULT_ERROR, $FAULT_COUNT times. */
static int fails(const char *path) {
    static long failed = 0;
    const char *part = getenv("FAULT_PATH");
    if (!part || !path || !strstr(path, part)) return 0;
    if (__sync_fetch_and_add(&failed, 1) >= atol(getenv("FAULT_COUNT"))) return 0;
    errno = atoi(getenv("FAULT_ERROR"));
    return 1;
}
#define MODE(flags) \
    int mode = 0; va_list list; va_start(list, flags); \
    if (flags & (O_CREAT | O_TMPFILE)) mode = va_arg(list, int); \
    va_end(list)
#define OPEN(name) int name(const char *path, int flags, ...) { \
    MODE(flags); \
    if (fails(path)) return -1; \
    int (*next)(const char *, int, ...) = dlsym(RTLD_NEXT, #name); \
    return next(path, flags, mode); }
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { \
    MODE(flags); \
    if (fails(path)) return -1; \
    int (*next)(int, const char *, int, ...) = dlsym(RTLD_NEXT, #name); \
    return next(folder, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
"""

_KILLS = flags.DEFINE_integer("kills_each", 12, "Of each command.", 1)
_TRIES = flags.DEFINE_integer("tries", 10, "Of two runs at once.", 1)
_ONLY = flags.DEFINE_list("only", list(PARTS), f"Some of {', '.join(PARTS)}.")


def python(*arguments: object, **options) -> subprocess.Popen:
    """A Python process in the repository, whose output is kept."""
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **options)


def module(name: str, *arguments: object, **options) -> subprocess.Popen:
    """A command of this package."""
    return python("-m", f"jax_distill.{name}", *arguments, **options)


def train(workdir: Path, **options) -> subprocess.Popen:
    """The small training run."""
    settings = [f"--config.{key}={value}" for key, value in SMALL.items()]
    start = ["--config=configs/teacher.py", f"--workdir={workdir}", *settings]
    return module("main", *start, **options)


def ended(process: subprocess.Popen) -> str:
    """The output of a command that must end well."""
    output, _ = process.communicate(timeout=LIMIT)
    if process.returncode:
        sys.exit(f"{' '.join(process.args[1:4])} failed:\n{output}")
    return output


def sentence(process: subprocess.Popen) -> str:
    """The one sentence that a command ended with; "" if it ended well or said more."""
    output, _ = process.communicate(timeout=LIMIT)
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    clean = process.returncode == 1 and len(said) == 1 and "Traceback" not in output
    if not clean:
        print(f"exit code {process.returncode}:\n{output[-2000:]}", flush=True)
    return said[0] if clean else ""


def wait_until(process: subprocess.Popen, happened: Callable[..., bool], *arguments: Path) -> None:
    """Returns when something has happened, or the process has ended."""
    while process.poll() is None and not happened(*arguments):
        time.sleep(0.002)


def same_run(workdir: Path, reference: dict[str, np.ndarray]) -> bool:
    """Whether a run ended bit for bit as another, with nothing left behind."""
    total, equal = same_numbers(outcome(workdir), reference)
    left = [path for path in workdir.rglob("*") if ".partial" in path.name or "lease" in path.name]
    left += workdir.rglob("*.orbax-checkpoint-tmp*")
    return total == equal and not left


def report(benchmark: str, good: int, tries: int, reference: str, **more: object) -> None:
    line = {"benchmark": benchmark, "ratio": good / tries, "reference": reference}
    print(json.dumps({**line, "tries": tries, **more}), flush=True)


def same_folder(a: Path, b: Path) -> bool:
    """Whether two folders hold the same; Orbax trees by their arrays, whose files have other names
    each time."""
    names = {path.name for path in a.iterdir()}
    if names != {path.name for path in b.iterdir()}:
        return False
    if "_METADATA" in names:
        trees = [jax.tree_util.tree_leaves_with_path(open_tree(folder)) for folder in (a, b)]
        arrays = [{str(path): leaf.read() for path, leaf in tree} for tree in trees]
        total, equal = same_numbers(*arrays)
        return total == equal
    return all(
        same_folder(a / name, b / name)
        if (a / name).is_dir()
        else filecmp.cmp(a / name, b / name, shallow=False)
        for name in names
    )


def half_made(place: Path) -> bool:
    """Whether a folder is being made there, or was when the process died."""
    return any((*place.glob(".out.*.partial"), *place.glob(".out.unfinished")))


def kills(folder: Path, rng: random.Random) -> None:
    import random_pipeline  # needs diffusers

    random_pipeline.save_random(folder / "source")
    commands = {
        "prepare": ["--examples=2000"],
        "export": ["--checkpoint=embedded"],
        "port": [f"--source={folder / 'source'}"],
    }
    for name, arguments in commands.items():
        alone, place = folder / name / "alone", folder / name / "killed"
        begun = time.monotonic()
        ended(module(name, *arguments, f"--output={alone}"))
        duration = time.monotonic() - begun
        good = writing = 0
        for number in range(_KILLS.value):
            place.mkdir(parents=True, exist_ok=True)
            process = module(name, *arguments, f"--output={place / 'out'}")
            if number % 4 == 0:
                time.sleep(rng.uniform(0, duration))
            else:
                wait_until(process, half_made, place)
                time.sleep(rng.choice([0, rng.uniform(0, 0.3), rng.uniform(0, 1)]))
            process.kill()
            process.communicate()
            writing += half_made(place)
            if not (place / "out").exists():
                ended(module(name, *arguments, f"--output={place / 'out'}"))
            good += os.listdir(place) == ["out"] and same_folder(place / "out", alone)
            shutil.rmtree(place)
            print(f"{name}: {number + 1} kills, {good} good, {writing} while writing", flush=True)
        report(
            f"kill_{name}",
            good,
            _KILLS.value,
            "the folder of a command left alone",
            writing=writing,
        )


def errors(folder: Path, rng: random.Random) -> None:
    del rng
    if shutil.which("gcc") is None:
        print("errors: not run, there is no gcc")
        return
    (folder / "fault.c").write_text(FAILING_READS)
    library = folder / "fault.so"
    command = ["gcc", "-shared", "-fPIC", "-o", library, folder / "fault.c", "-ldl"]
    subprocess.run(command, check=True)
    ended(train(folder / "whole"))
    reference = outcome(folder / "whole")
    process = train(folder / "run")
    wait_until(process, (folder / "run" / "checkpoints" / "8").exists)
    process.kill()
    process.communicate()
    checkpoints = folder / "run" / "checkpoints"
    newest = max(ocp.utils.checkpoint_steps(checkpoints))
    good = 0
    for name in ERRORS:
        for count in (2, 10**9):  # the next try succeeds, or none does
            workdir = folder / f"{name}-{count}"
            shutil.copytree(folder / "run", workdir)
            kept = workdir / "checkpoints" / str(newest)
            fault = {"LD_PRELOAD": library, "FAULT_PATH": f"{kept}/state/", "FAULT_COUNT": count}
            fault |= {"FAULT_ERROR": getattr(errno, name)}
            process, fine = train(workdir, env={key: str(x) for key, x in fault.items()}), True
            if count > 2:
                said = sentence(process)
                fine = str(kept) in said and "it is kept" in said and kept.exists()
                process = train(workdir)
            fine &= f"after step {newest} of" in ended(process)
            fine &= not any(kept.parent.glob("damaged*")) and same_run(workdir, reference)
            good += fine
            print(f"{name}, {count} times: {good} good", flush=True)
            shutil.rmtree(workdir)
    report("passing_errors", good, 2 * len(ERRORS), "a checkpoint that is kept", kinds=len(ERRORS))


@contextlib.contextmanager
def small_disk(folder: Path, mib: int = 64) -> Iterator[Path]:
    """A disk of its own, in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> None:
    """Takes all the room that a disk has."""
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def full(folder: Path, rng: random.Random) -> None:
    del rng
    ended(train(folder / "whole"))
    reference = outcome(folder / "whole")
    moments: dict[str, Callable[[Path], bool]] = {
        "before it starts": lambda workdir: True,
        "when it has begun": lambda workdir: (workdir / "config.json").exists(),
        "at the first checkpoint": lambda workdir: lines(workdir) >= 1,
        "at a later checkpoint": lambda workdir: lines(workdir) >= 6,
        "at the last pictures": lambda workdir: lines(workdir) >= SMALL["total_steps"] // 2,
    }
    good = 0
    for name, happened in moments.items():
        with contextlib.ExitStack() as stack:
            try:
                disk = stack.enter_context(small_disk(folder / name.replace(" ", "_")))
            except (OSError, subprocess.CalledProcessError):
                print("full: not run, a tmpfs cannot be mounted")
                return
            workdir = disk / "run"
            if happened(workdir):
                fill(disk)
            process = train(workdir)
            wait_until(process, happened, workdir)
            fill(disk)
            said = sentence(process)
            (disk / "filler").unlink()
            half = list(workdir.rglob("*.orbax-checkpoint-tmp")) if workdir.exists() else []
            fine = "no space left" in said and "last good checkpoint" in said and not half
            ended(train(workdir))
            good += fine and same_run(workdir, reference)
            print(f"full {name}: {said}; {good} good", flush=True)
    report("disk_full", good, len(moments), "a run with room")


def two(folder: Path, rng: random.Random) -> None:
    ended(train(folder / "whole"))
    reference = outcome(folder / "whole")
    good = 0
    for number in range(_TRIES.value):
        workdir = folder / str(number)
        begun, first = time.monotonic(), train(workdir)
        wait_until(first, (workdir / ".lease.json").exists)
        delay = rng.uniform(0, time.monotonic() - begun)
        time.sleep(delay)
        second = train(workdir)
        if number % 2:  # so that it is there however long the second takes to start
            first.send_signal(signal.SIGSTOP)
        said = sentence(second)
        first.send_signal(signal.SIGCONT)
        ended(first)
        good += f"in use by process {first.pid} on" in said and same_run(workdir, reference)
        print(f"two: {number + 1} tries, {good} good, after {delay:.1f} s", flush=True)
        shutil.rmtree(workdir)
    report("two_runs", good, _TRIES.value, "a run alone")


def main(argv):
    del argv
    logging.set_verbosity(logging.ERROR)
    warnings.simplefilter("ignore")  # that arrays are read to where they were
    parts = {"kills": kills, "errors": errors, "full": full, "two": two}
    for name in _ONLY.value:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder), random.Random(flags.FLAGS.seed))


if __name__ == "__main__":
    app.run(main)
