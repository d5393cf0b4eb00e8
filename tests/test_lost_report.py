"""JAX's report of a lost process is one sentence; all else that a process writes is untouched.

With -m slow processes of a run are killed.
"""

import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jax_distill.devices import lost_report

ROOT = Path(__file__).parents[1]

BEFORE = """\
E1126 02:07:03.835494    1262 coordination_service.cc:1549] [144937] Use error polling to propagate\
 the following error to all tasks: UNAVAILABLE: The following tasks are unhealthy:
1
The tasks have crashed. [type.googleapis.com/tensorflow.CoordinationServiceError='']
W1126 02:07:08.596005    1453 preemption_sync_manager.cc:147] Failed to retrieve: UNAVAILABLE:
:UNKNOWN:Error received from peer  {grpc_message:"Socket closed", grpc_status:14}.
E1126 02:07:08.596049    1453 coordination_service_agent.cc:289] Polled an error from coordination\
 service (this can be an error from this or another task).
"""
END = """\
F1126 02:07:08.596136    1453 client.h:80] Terminating process because the JAX distributed service\
 detected fatal errors. This most likely indicates that another task died. absl::Status: UNAVAILABLE

RPC: /xla.coordination.CoordinationService/PollForError
*** Check failure stack trace: ***
    @     0x7f5983640634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
STACKS = """\
Fatal Python error: Aborted

Thread 0x00007f598b1c3b80 (most recent call first):
  File "training/train.py", line 103 in wait

Extension modules: numpy._core._multiarray_umath, msgspec._core (total: 2)
"""
LOG = "step 4: loss 0.5\nüß without an end"
CHECK = (
    "F1126 02:07:08.596136 77 literal.cc:80] Check failed: a == b\n    @  0x7f5 xla::Literal()\n"
)
RECORDS = re.split(r"(?m)^(?=[EW]\d{4} )", BEFORE)  # each is written in one piece
SEGFAULT = STACKS.replace("Aborted", "Segmentation fault")


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ([LOG, "\n"], LOG + "\n"),
        ([LOG, BEFORE, END, STACKS], f"{LOG}\n{lost_report.LOST}\n"),
        (["", BEFORE + END + STACKS], f"{lost_report.LOST}\n"),
        ([LOG, "\n", *RECORDS, END], f"{LOG}\n{lost_report.LOST}\n"),
        ([BEFORE, f"{lost_report.LOST}\n", BEFORE, END], f"{lost_report.LOST}\n"),
        ([END, BEFORE, END, "Traceback (most"], f"{lost_report.LOST}\n"),
        ([BEFORE, LOG], BEFORE + LOG),  # a process is warned, and goes on
        ([LOG, SEGFAULT], LOG + SEGFAULT),
        ([BEFORE, CHECK, STACKS], BEFORE + CHECK + STACKS),
        ([BEFORE, END, *SEGFAULT], f"{lost_report.LOST}\n{SEGFAULT}"),
    ],
)
def test_a_report_of_a_lost_process_is_one_sentence_and_all_else_passes(written, printed):
    shortened = lost_report.Shortened()
    passed = b"".join(shortened.add(text.encode()) for text in written)
    assert (passed + shortened.release()).decode() == printed


def test_processes_that_never_come_are_said_to_be_missing():
    shortened = lost_report.Shortened()
    report = END.replace("PollForError", "RegisterTask")
    printed = shortened.add(report.encode()).decode()
    assert printed.startswith("error: the processes of this run do not find each other (")
    assert printed.endswith(f"{lost_report.ADVICE}\n") and printed.count("\n") == 1


SHORTENED = """
    import os, signal, subprocess, sys
    from jax_distill.devices import lost_report
    lost_report.shorten()
"""


def shortened(code, *, closes=False, **options):
    """Starts a program without JAX that shortens reports, or closes stderr and tries to."""
    program = (
        "import os; os.close(2)\n" * closes + textwrap.dedent(SHORTENED) + textwrap.dedent(code)
    )
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, **options)


def test_stderr_of_a_process_that_aborts_and_of_its_children_is_shortened():
    """Whatever signals are sent to all that it has started."""
    code = f"""
        print("first", file=sys.stderr)
        os.system("echo of a child >&2")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(int(open("/proc/thread-self/children").read()), number)
        os.write(2, {(BEFORE + END).encode()!r})
        import faulthandler
        faulthandler.enable()
        os.abort()
    """
    process = shortened(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.communicate(timeout=60) == (
        "",
        f"first\nof a child\n{lost_report.LOST}\n",
    )
    assert process.returncode == -signal.SIGABRT


def test_what_is_written_passes_at_once_and_errors_of_the_service_soon():
    code = f"""
        for text in ("no end", {BEFORE!r}):
            sys.stderr.write(text)
            sys.stderr.flush()
            sys.stdin.readline()
    """
    process = shortened(code, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr.read(6) == "no end"  # while the process waits for an answer
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert process.stderr.read(len(BEFORE)) == BEFORE
    assert process.communicate("go on\n", timeout=60) == (None, "")
    assert process.returncode == 0


def test_without_stderr_or_its_reader_nothing_changes():
    code = """
        os.write(1, b"done")
        sys.exit(os.dup(1) != 2)  # stderr is still closed
    """
    closed = shortened(code, closes=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert closed.communicate(timeout=60) == ("done", "") and closed.returncode == 0
    code = """
        sys.stdin.read()
        try:
            while True:
                os.write(2, b"a line\\n")
        except BrokenPipeError:
            os._exit(7)
    """
    unread = shortened(code, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    unread.stderr.close()
    unread.stdin.close()
    assert unread.wait(timeout=60) == 7


COMPILES = """
    import os, sys, time
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jax_distill.devices import processes
    from jax_distill.runs import commands
    processes.define_flags()

    def main(argv):
        processes.join()
        print("joined", flush=True)
        time.sleep(300)  # as a compilation, in which no error of JAX is raised in Python

    commands.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_lost_while_another_compiles_ends_it_with_one_sentence(lost):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags_ = [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    flags_ += ["--heartbeat_timeout_seconds=3"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(COMPILES), *flags_, f"--process_id={index}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in running:
            assert process.stdout.readline() == "joined\n"
        running[lost].kill()
        _, errors = running[1 - lost].communicate(timeout=60)
        assert running[1 - lost].returncode and errors == f"{lost_report.LOST}\n"
    finally:
        for process in running:
            process.kill()
            process.communicate()
