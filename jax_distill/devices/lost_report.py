"""Copies stdin to stderr, with JAX's report of a lost process shortened to one sentence.

When a process is lost, JAX's coordination client ends each other one from C++: some lines of
errors, a fatal one, its stack, and then the stacks of all threads, from Python's handler of
SIGABRT. No handler of ours runs then, so a program beside the process (`shorten`) reads what it
writes. It imports little, to be there at once, and ends when nobody can write to it.
"""

import os
import re
import select
import signal
import subprocess
import sys

LOST = (
    "error: a process of this run was lost, or failed, and this one ends with it; when all have"
    " ended, run the same command to go on"
)
APART = "the processes of this run do not find each other"
ADVICE = (
    "give each the same --coordinator_address=HOST:PORT and --num_processes, and its own"
    " --process_id; on a TPU pod or under Slurm none of them"
)
_SENTENCE = f"{LOST}\n".encode()
_NOT_FOUND = f"error: {APART} (not all have come in time, or one was lost); {ADVICE}\n".encode()
_TIME_AND_THREAD = rb"\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ "
_RECORD = re.compile(rb"(?=[IWEF]" + _TIME_AND_THREAD + rb"|" + re.escape(_SENTENCE) + rb")")
_BEFORE = re.compile(
    rb"[WE]" + _TIME_AND_THREAD + rb"\S*(?:coordination_service\w*|preemption_sync_manager)\.cc:"
)
_END = re.compile(
    rb"F" + _TIME_AND_THREAD + rb"\S+ Terminating process because the JAX distributed service"
    rb"|" + re.escape(_SENTENCE)
)
_REGISTERING = b"CoordinationService/RegisterTask"  # each waits in it until all are there
_OTHER_CRASH = re.compile(rb"^Fatal Python error: (?!Aborted)(?=.{7})", re.MULTILINE)
_PATIENCE = (
    0.5  # seconds from an error of the coordination service to the fatal one, which take 1 ms
)
_SIGNALS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGTERM")


def shorten() -> None:
    """Shortens JAX's reports of a lost process to one sentence on stderr, from now on.

    Everything that this process and its children write to file descriptor 2 goes through `main`,
    in a process of its own: the report is written from C++ while this one aborts.
    (JAX accepts a callback instead, but its bindings cannot call a Python one; with
    `jax_enable_recoverability` the loss of process 0 is fatal as before.) Where there is no stderr,
    or nothing can be started, reports are as they were.
    """
    try:
        os.fstat(2)
    except OSError:
        return
    reading, writing = os.pipe()
    try:
        command = [sys.executable, "-I", "-S", __file__]
        # In a session of its own, signals of the terminal do not reach it.
        copier = subprocess.Popen(
            command, stdin=reading, stdout=subprocess.PIPE, cwd="/", start_new_session=True
        )
        with copier.stdout:
            if copier.stdout.readline():
                os.dup2(writing, 2)
    except OSError:
        pass
    finally:
        os.close(reading)
        os.close(writing)


class Shortened:
    """Text of a process's stderr, in which the report of a lost process is one sentence.

    Its order is kept, and all that is no report passes at once.
    """

    def __init__(self) -> None:
        self.held = b""
        """Errors of the coordination service that may be the beginning of a report."""
        self._ended = False
        self._in_line = False  # as after a line of progress that is written over
        self._line = b""

    def add(self, text: bytes) -> bytes:
        """The bytes to print now, after those that the process has written in one piece or more."""
        if self._ended:
            return self._other_crash(text)
        passed = b""
        for record in _RECORD.split(text):
            if _END.match(record):
                self._ended, self.held = True, b""
                return self._passed(passed) + b"\n" * self._in_line + _sentence(record)
            self.held += record
            if record and not _BEFORE.match(record):
                passed += self.release()
        return self._passed(passed)

    def _passed(self, text: bytes) -> bytes:
        self._in_line = not text.endswith(b"\n") if text else self._in_line
        return text

    def release(self) -> bytes:
        """Releases the held bytes: no report has followed."""
        held, self.held = self.held, b""
        return held

    def _other_crash(self, text: bytes) -> bytes:
        """The part that is no report of a lost process: Python's own, of another signal."""
        text = self._line + text
        if found := _OTHER_CRASH.search(text):
            self._ended, self._line = False, b""
            return text[found.start() :]
        self._line = text[text.rfind(b"\n") + 1 :]
        return b""


def _sentence(report: bytes) -> bytes:
    return _NOT_FOUND if _REGISTERING in report else _SENTENCE


def _print(text: bytes) -> None:
    """Writes to stderr; raises only if its reader is gone, which the process is to notice too."""
    while text:
        try:
            text = text[os.write(2, text) :]
        except BlockingIOError:
            select.select([], [2], [])
        except BrokenPipeError:
            raise
        except OSError:  # such as of a full disk; the process goes on
            return


def main() -> None:
    for name in _SIGNALS:  # they mean the process, which may have something to say about them
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.write(1, b"ready\n")
    shortened = Shortened()
    while True:
        if shortened.held and not select.select([0], [], [], _PATIENCE)[0]:
            _print(shortened.release())
        text = os.read(0, 1 << 20)
        _print(shortened.add(text) if text else shortened.release())
        if not text:
            return


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(1)
