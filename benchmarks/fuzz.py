"""Damaged files of every kind that is read: each is refused in one sentence, or read as it says.

    python benchmarks/fuzz.py [--kinds=records,pictures,..] [--inputs=20000] [--seed=0] [--show=3]
        [--workers=2] [--keep=DIR] [--replay=kind:number]

Inputs are good files that were damaged at random: by bits and bytes, and by what they hold (JSON,
lines, pickles, PNG chunks, headers of safetensors, files that are folders, pipes or links). None
may end in a traceback or an error that is no clear sentence, take more than 10 s or 1 GB, run
anything, or be read as something else than another reader of the format says: PyTorch, safetensors,
Pillow and numpy, transformers, `json`. The table counts inputs by kind; what fails alike stands
below it with numbers to give to --replay. The last line is JSON: `ratio` is the share of inputs
that failed. The package is that of PYTHONPATH, or of the folder that this is run from.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

NAMES = ("weights", "records", "configs", "results", "metrics", "pictures", "metadata")
NAMES += ("captions", "packed", "tokenizers", "folders")
SECONDS = 10.0
"""That reading one input may take, on a machine that does nothing else."""
_SLOW = 120.0  # for all around it: making the input, loading libraries, the other reader
_MAKING = 600.0  # for bases

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # A cache of compiled programs would be written while an input is read, outside of its folder.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONWARNINGS": "ignore",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


GOOD = ("refused", "same")
COLUMNS = {  # outcomes, and what they are called
    "refused": "refused",
    "same": "same",
    "traceback": "tracebacks",
    "unclear": "unclear",
    "hang": "over 10 s",
    "memory": "above 1 GB",
    "executed": "executed",
    "meaning": "other meaning",
}


class Failure(NamedTuple):
    kind: str
    number: int
    outcome: str
    group: str
    message: str


def _find_package() -> None:
    """Puts the tree that the package is to come from in front."""
    import importlib.util

    here = Path.cwd()
    if "PYTHONPATH" not in os.environ and (here / "jax_distill").is_dir():
        sys.path.insert(0, str(here))
    root = Path(importlib.util.find_spec("jax_distill").origin).parents[1]
    sys.path += [str(root / "tests"), str(Path(__file__).parent)]


def _quiet() -> None:
    import logging
    import warnings

    from absl import logging as absl_logging

    warnings.simplefilter("ignore")
    absl_logging.set_verbosity("fatal")
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _make_bases(bases: Path, names: list[str]) -> None:
    _find_package()
    from fuzzing.kinds import KINDS

    for name in names:
        (bases / name).mkdir()
        KINDS[name].make(bases / name)


def _work(pipe: Connection, scratch: Path, bases: Path, seed: int) -> None:
    _find_package()

    def make():
        from fuzzing import package, sandbox
        from fuzzing.kinds import KINDS

        _quiet()
        return sandbox.Sandbox(scratch, bases, KINDS, package.is_ours)

    from fuzzing.sandbox import work

    work(pipe, make, seed)


class Worker:
    """One process, what it does, and since when."""

    def __init__(self, folder: Path, bases: Path, seed: int):
        self._folder, self._arguments = folder, (bases, seed)
        self._start()

    def _start(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, self._folder, *self._arguments)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.task, self.state, self.since = None, "loading", time.monotonic()
        self.begun = self.since

    def give(self, task: tuple[str, int]) -> None:
        self.task, self.state, self.since = task, "making", time.monotonic()
        self.begun = self.since
        self.pipe.send(task)

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def busy(self) -> bool:
        return self.state != "idle"

    def where(self) -> str:
        """The frame that the process is in, of those of the package; or all that is known."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        path = self._folder / "stack"
        frames = (
            re.findall(r'"(.*)", line (\d+) in (\w+)', path.read_text()) if path.exists() else []
        )
        for file, line, name in frames:
            if "jax_distill" in file:
                return f"while it was {self.state}, at {Path(file).name}:{line} {name}"
        return f"while it was {self.state}"

    def overdue(self) -> bool:
        limit = SECONDS if self.state == "reading" else _SLOW
        limit *= max(1.0, os.getloadavg()[0] / os.cpu_count())  # others may use the machine, too
        return self.task is not None and time.monotonic() - self.since > limit


def shares(names: list[str], inputs: int) -> dict[str, int]:
    """How many inputs of each kind, by what they cost."""
    from fuzzing.kinds import KINDS

    total = sum(KINDS[name].share for name in names)
    return {name: max(1, round(inputs * KINDS[name].share / total)) for name in names}


class Tally:
    """Counts and seconds by kind, and all that failed."""

    def __init__(self, names: Iterable[str], aloud: bool):
        self.table = {name: collections.Counter() for name in names}
        self.seconds = dict.fromkeys(self.table, 0.0)
        self.failures: list[Failure] = []
        self._aloud = aloud

    def add(self, worker: Worker, outcome: str, group: str, message: str) -> None:
        """Counts the input that a worker has."""
        name, number = worker.task
        worker.task = None
        self.table[name][outcome] += 1
        self.seconds[name] += time.monotonic() - worker.begun
        if self._aloud:
            print(f"{name}:{number} {outcome}: {group}\n    {message}")
        if outcome not in GOOD:
            self.failures.append(Failure(name, number, outcome, group, message))

    def counts(self) -> collections.Counter:
        return sum(self.table.values(), collections.Counter())


def run(tasks: list[tuple[str, int]], seed: int, workers: int, folder: Path, tally: Tally) -> None:
    """Judges inputs, (kind, number) each, in several processes.

    Raises:
      RuntimeError: the benchmark itself fails.
    """
    bases = folder / "bases"
    bases.mkdir()
    context = multiprocessing.get_context("spawn")
    making = context.Process(target=_make_bases, args=(bases, list(tally.table)))
    making.start()
    making.join(_MAKING)
    if making.exitcode != 0:
        raise RuntimeError("the bases could not be made")
    waiting = collections.deque(tasks)
    pool = [Worker(folder / f"worker{i}", bases, seed) for i in range(workers)]
    try:
        while waiting or any(worker.busy() for worker in pool):
            ready = wait([worker.pipe for worker in pool if worker.state != "idle"], 0.5)
            for worker in pool:
                if worker.pipe in ready:
                    _hear(worker, tally)
                elif worker.overdue():
                    tally.add(worker, "hang", worker.where(), f"more than {SECONDS:.0f} s")
                    worker.restart()
                if worker.state == "idle" and waiting:
                    worker.give(waiting.popleft())
    finally:
        for worker in pool:
            worker.stop()


def _hear(worker: Worker, tally: Tally) -> None:
    """Takes what a worker says: where it is, or an outcome; or notices that it has died."""
    try:
        message = worker.pipe.recv()
    except (EOFError, ConnectionError):
        if worker.task is None or worker.state == "making":
            raise RuntimeError(f"a process died while it made {worker.task}") from None
        worker.process.join()
        died = f"the process died while it was {worker.state}"
        tally.add(worker, "traceback", died, f"exit code {worker.process.exitcode}")
        worker.restart()
        return
    if isinstance(message, tuple):
        tally.add(worker, *message)
        worker.state = "idle"
    elif message.startswith("fault"):
        raise RuntimeError(message)
    else:
        worker.state, worker.since = message, time.monotonic()


def keep(failures: list[Failure], seed: int, folder: Path, target: Path) -> None:
    """Saves the inputs that failed; those with holes of gigabytes keep their holes."""
    sandbox = _sandbox(folder)
    for failure in failures:
        made, _, _ = sandbox.make(failure.kind, failure.number, seed)
        place = target / f"{failure.kind}-{failure.number}"
        os.makedirs(place.parent, exist_ok=True)
        os.system(f"cp -a --sparse=always '{made}' '{place}'")


def _sandbox(folder: Path):
    from fuzzing import package, sandbox
    from fuzzing.kinds import KINDS

    scratch = folder / "replay"
    scratch.mkdir(exist_ok=True)
    return sandbox.Sandbox(scratch, folder / "bases", KINDS, package.is_ours)


def show(tally: Tally, examples: int) -> None:
    """Prints counts by kind, and what fails alike."""
    print(f"{'kind':<12}{'inputs':>8}" + "".join(f"{x:>15}" for x in COLUMNS.values()) + "       s")
    seconds = {**tally.seconds, "all": sum(tally.seconds.values())}
    for name, counts in {**tally.table, "all": tally.counts()}.items():
        cells = "".join(f"{counts[column]:>15}" for column in COLUMNS)
        print(f"{name:<12}{counts.total():>8}{cells}{seconds[name]:>8.0f}")
    groups = collections.defaultdict(list)
    for failure in tally.failures:
        groups[failure.kind, failure.outcome, failure.group].append(failure)
    for (kind, outcome, group), alike in sorted(groups.items(), key=lambda x: -len(x[1])):
        numbers = " ".join(f"{kind}:{failure.number}" for failure in alike[:examples])
        print(f"\n{len(alike)} x {kind}, {COLUMNS[outcome]}: {group}\n    --replay={numbers}")
        print(f"    {alike[0].message[:300]!r}")


def _stop(number: int, frame: object) -> None:
    """Ends the run with the table as it is."""
    raise RuntimeError("stopped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", default=",".join(NAMES))
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="examples of what fails alike")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that fail")
    parser.add_argument("--replay", help="kind:number, one input and all about it")
    options = parser.parse_args()
    os.environ.update(_ENVIRONMENT)
    signal.signal(signal.SIGTERM, _stop)
    _find_package()
    if options.replay:
        name, _, number = options.replay.partition(":")
        tasks, options.kinds, options.workers = [(name, int(number))], name, 1
    names = options.kinds.split(",")
    if unknown := set(names) - set(NAMES):
        sys.exit(f"--kinds: {min(unknown)!r} is none of {', '.join(NAMES)}")
    if not options.replay:
        counts = shares(names, options.inputs)
        tasks = [(name, number) for name in names for number in range(counts[name])]
    begun = time.monotonic()
    tally, fault = Tally(names, aloud=bool(options.replay)), None
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        folder = Path(folder)
        os.environ["HF_HOME"] = os.environ["MPLCONFIGDIR"] = str(folder / "caches")
        try:
            run(tasks, options.seed, options.workers, folder, tally)
        except RuntimeError as error:
            fault = error
        if options.keep:
            keep(tally.failures, options.seed, folder, options.keep.resolve())
    show(tally, options.show)
    for name, counts in tally.table.items():
        if counts.total() > 50 and not counts["same"]:
            fault = f"none of {name} was read: are its bases what is read today?"
    if fault:
        sys.exit(f"error: {fault}")
    line = {
        "benchmark": "fuzz",
        "ratio": len(tally.failures) / len(tasks),
        "reference": "all inputs; 0 of them may fail",
        "inputs": len(tasks),
        **{column: tally.counts()[column] for column in COLUMNS},
        "seed": options.seed,
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps(line))
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
