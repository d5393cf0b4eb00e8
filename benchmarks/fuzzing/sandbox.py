"""A process that reads inputs and judges each: what it did, what it took, what came of it.

The process tells its parent before it begins to read and after, and may die: it is the parent's to
notice. What is read here may run away with memory, so that the process has little more than 1 GB
to take.
"""

import contextlib
import faulthandler
import os
import re
import resource
import shutil
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from fuzzing.kind import OUTSIDE, Kind
from fuzzing.mutations import CANARY

LIMIT = 10**9
"""Bytes that reading one input may take."""
_ROOM = LIMIT + 2 * 10**8  # until memory runs out, so that it is known by how much it did
_UNDAMAGED = 0.01  # of the inputs
LONGEST = 2000  # characters of a message
_NEVER = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_NEVER += ("pty.spawn", "ftplib.connect", "urllib.Request", "webbrowser.open")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "shutil.rmtree")

REFUSED, SAME = "refused", "same"
STACK = "stack"
"""A file in the scratch folder, for where a process is that gets SIGUSR1."""


class Outcome(NamedTuple):
    """The outcome of one input.

    Attributes:
      kind: `REFUSED`, `SAME`, or in which way it failed: "traceback", "unclear", "hang", "memory",
        "executed", "meaning".
      group: what inputs that fail alike have in common.
      message: the error's, or more words.
    """

    kind: str
    group: str = ""
    message: str = ""


class Watch:
    """Notes what an input makes the process do, once it is armed."""

    def __init__(self, scratch: Path):
        self._scratch = str(scratch)
        self._armed = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def armed(self) -> Any:
        self._armed, self.seen = True, []
        try:
            yield
        finally:
            self._armed = False

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self._armed:
            return
        if event in _NEVER:
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "compile" and CANARY in str(arguments[0]):
            self.seen.append(f"compile {str(arguments[0])[:200]}")
        elif event == "import" and CANARY in str(arguments[0]):
            self.seen.append(f"import {arguments[0]}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._check(event, arguments[0])
        elif event in _CHANGES:
            self._check(event, arguments[0])

    def _check(self, event: str, path: Any) -> None:
        """Notes a change outside of the scratch folder."""
        path = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | Path) else ""
        if path and not path.startswith((self._scratch, "/dev/null", "/dev/shm")):
            self.seen.append(f"{event} {path}")


def _status(name: str) -> int:
    """A number of bytes in this process's status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


@contextlib.contextmanager
def _measured(taken: list[int]) -> Any:
    """Limits the memory that a block may take, and measures it."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is as of now
    before = _status("VmRSS")
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + _ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        taken.append(_status("VmHWM") - before)


def _where(error: BaseException, is_ours: Any) -> str:
    """The last frame of the package that an error went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_ours(f.filename)]
    if not frames:
        return "outside of the package"
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}"


def _refusal(error: BaseException, folder: Path, is_ours: Any) -> Outcome:
    """Whether an error is one clear sentence."""
    where, text = _where(error, is_ours), str(error)
    group = f"{type(error).__name__} at {where}"
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = isinstance(error, ValueError | RuntimeError) and is_ours(last)
    foreign = isinstance(error, RecursionError | NotImplementedError | UnicodeError)
    if isinstance(error, MemoryError):
        return Outcome("memory", group, text)
    if foreign or not (ours or isinstance(error, OSError)):
        return Outcome("traceback", group, text)
    names = {path.name for path in [folder, *folder.parent.rglob("*")]}
    named = any(name in text for name in names) or re.search(r"[\w.]+\w: |--\w+|^\w+ config", text)
    if not text.strip():
        return Outcome("unclear", f"{group}: says nothing", text)
    if "\n" in text or "\r" in text:
        return Outcome("unclear", f"{group}: several lines", text)
    if len(text) > LONGEST:
        return Outcome("unclear", f"{group}: more than {LONGEST} characters", text[:300])
    if not named:
        return Outcome("unclear", f"{group}: names neither file nor key", text)
    return Outcome(REFUSED, group, text)


class Sandbox:
    """Makes inputs in a folder of its own and reads them."""

    def __init__(self, scratch: Path, bases: Path, kinds: dict[str, Kind], is_ours: Any):
        self._scratch, self._bases, self._kinds, self._is_ours = scratch, bases, kinds, is_ours
        self._watch = Watch(scratch)
        self._kind = ""
        faulthandler.register(signal.SIGUSR1, (scratch / STACK).open("w"), all_threads=False)
        os.chdir(scratch)  # where a payload makes its file
        os.fsync = lambda descriptor: None  # most of the time of `port`; nothing is to be kept

    def begin(self, name: str) -> None:
        """Reads all bases of a kind, so that what that loads is loaded."""
        self._kind = name
        shutil.rmtree(self._scratch / OUTSIDE, ignore_errors=True)
        shutil.copytree(self._bases / name / OUTSIDE, self._scratch / OUTSIDE)
        for base in self._names(name):
            folder, kind = self._copy(name, base), self._kinds[name]
            with contextlib.suppress(Exception):  # inputs without damage are judged, too
                value = kind.read(Random(0), folder)
                kind.differs(value, folder, self._bases / name / base)

    def _names(self, name: str) -> list[str]:
        return sorted(path.name for path in (self._bases / name).iterdir() if path.name != OUTSIDE)

    def _copy(self, name: str, base: str) -> Path:
        folder = self._scratch / "input"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._bases / name / base, folder)
        return folder

    def make(self, name: str, number: int, seed: int) -> tuple[Path, Path, Random]:
        """The input of a number: its folder, its base, and the rest of its randomness."""
        rng = Random(f"{seed} {name} {number}")
        base = rng.choice(self._names(name))
        folder = self._copy(name, base)
        if rng.random() > _UNDAMAGED:
            self._kinds[name].damage(rng, folder)
        return folder, self._bases / name / base, rng

    def judge(self, name: str, number: int, seed: int, tell: Any) -> Outcome:
        """Makes an input, reads it, and says what came of it.

        Args:
          tell: called with "reading" before the package is called, with "read" after it.
        """
        if name != self._kind:
            self.begin(name)
        folder, base, rng = self.make(name, number, seed)
        kind, value, error, taken = self._kinds[name], None, None, []
        tell("reading")
        try:
            with _measured(taken), self._watch.armed():
                value = kind.read(rng, folder)
        except BaseException as raised:  # a panic of Rust is no Exception
            if isinstance(raised, KeyboardInterrupt):
                raise
            error = raised
        tell("read")
        canary = next((p for p in (Path(CANARY), folder / CANARY) if p.exists()), None)
        if canary is not None:
            canary.unlink()
        if self._watch.seen or canary is not None:
            what = (self._watch.seen or ["a payload made its file"])[0]
            return Outcome("executed", what.partition(" ")[0], what)
        outcome = Outcome(SAME)
        if error is not None:
            outcome = _refusal(error, folder, self._is_ours)
        if outcome.kind != "memory" and taken[0] > LIMIT:
            group = outcome.group or "accepted"
            return Outcome("memory", group, f"took {taken[0] / 1e9:.1f} GB")
        return self._compared(kind, value, folder, base) if outcome.kind == SAME else outcome

    def _compared(self, kind: Kind, value: Any, folder: Path, base: Path) -> Outcome:
        """Whether what was read is what the input says."""
        try:
            wrong = kind.differs(value, folder, base)
        except Exception as error:
            return Outcome("meaning", f"the other reader fails: {error!r}", traceback.format_exc())
        if not wrong:
            return Outcome(SAME)
        return Outcome("executed" if wrong.startswith("executed") else "meaning", wrong)


def work(pipe: Connection, make: Any, seed: int) -> None:
    """Judges inputs that come through a pipe, as (kind, number), until None comes.

    Args:
      pipe: takes "idle", "reading" and "read", and an `Outcome` as a tuple.
      make: makes the sandbox; what it loads is slow.
      seed: of all inputs.
    """
    sandbox = make()
    pipe.send("idle")
    while (task := pipe.recv()) is not None:
        try:
            pipe.send(tuple(sandbox.judge(*task, seed, pipe.send)))
        except Exception:  # a fault of the benchmark
            pipe.send(f"fault\n{task}: {traceback.format_exc()}")
