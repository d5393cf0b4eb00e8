"""One writer in a folder: whoever comes second is refused, and a dead process gives back."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_distill.storage import lease, liveness
from jax_distill.storage.files import partial_of, remove_leftovers, write_atomically
from jax_distill.storage.lease import NAME, InUse, of_folder, of_output

ROOT = Path(__file__).parents[1]

RACER = """
import os, sys
from pathlib import Path
from jax_distill.storage import lease
folder, count = Path(sys.argv[1]), int(sys.argv[2])
begin, end = os.pipe(), os.pipe()
if not any(os.fork() == 0 for _ in range(count)):
    sys.stdin.readline()
    os.close(begin[1])  # all begin at once
    sys.stdin.readline()
    os.close(end[1])
    for _ in range(count):
        os.wait()
    sys.exit()
os.close(begin[1]), os.close(end[1])
os.read(begin[0], 1)
try:
    with lease.of_folder(folder):
        os.write(1, f"{os.getpid()} held\\n".encode())
        os.read(end[0], 1)
except lease.InUse as error:
    os.write(1, f"{os.getpid()} {error}\\n".encode())
os._exit(0)
"""


@contextlib.contextmanager
def racing(folder, count=1):
    """Processes that try to hold a folder's lease at once, until their parent reads a line.

    Yields:
      the parent, what each has said by its number, and the number of the one that holds it.
    """
    command = [sys.executable, "-c", RACER, str(folder), str(count)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as parent:
        go_on(parent)
        lines = [parent.stdout.readline().partition(" ") for _ in range(count)]
        said = {int(number): text.rstrip() for number, _, text in lines}
        (holder,) = [number for number, text in said.items() if text == "held"]
        try:
            yield parent, said, holder
        finally:
            go_on(parent)
            assert parent.wait(60) == 0


def go_on(process):
    process.stdin.write("\n")
    process.stdin.flush()


def left_in(folder):
    return sorted(os.listdir(folder)) if folder.exists() else None


def stale(folder, **changes):
    """A lease of a process that has ended, and changes of what it says."""
    with subprocess.Popen(["true"]) as ended:
        pass
    holder = {**lease._own(), "pid": ended.pid, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps(holder))
    return folder / NAME


def test_of_many_that_start_at_once_exactly_one_holds_it(tmp_path):
    """First into a folder that is not there, then over the lease of the one that was killed."""
    folder = tmp_path / "a" / "run"
    with racing(folder, 12) as (_, said, holder):
        for number, text in said.items():
            if number != holder:
                assert f"in use by process {holder} on host" in text
                assert "wait for it, or give another --workdir" in text
        os.kill(holder, signal.SIGKILL)
        wait_until(lambda: not liveness.is_alive(holder))  # though nobody has waited for it
    assert left_in(folder) == [NAME]
    with racing(folder, 12) as (_, said, holder):
        assert len(said) == 12
    assert left_in(folder) == []


def test_a_lease_leaves_nothing_behind(tmp_path):
    with of_folder(tmp_path / "a" / "b"):
        assert left_in(tmp_path / "a" / "b") == [NAME]
        with of_folder(tmp_path / "a" / "b"):  # this process may
            pass
        assert left_in(tmp_path / "a" / "b") == [NAME]
    assert left_in(tmp_path) == []
    with pytest.raises(KeyError), of_folder(tmp_path / "a"):
        raise KeyError
    assert left_in(tmp_path) == []
    with of_folder(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert left_in(tmp_path / "a") == ["file"]
    with of_output(tmp_path / "out"):
        assert left_in(tmp_path) == [".out" + NAME, "a"]
    assert left_in(tmp_path) == ["a"]


def test_a_stopped_process_holds_its_lease(tmp_path):
    with racing(tmp_path) as (_, _, holder):
        os.kill(holder, signal.SIGSTOP)
        with pytest.raises(InUse, match=rf"process {holder} on host .* since \d{{4}}-"):
            with of_folder(tmp_path):
                pass
        os.kill(holder, signal.SIGCONT)
    with of_folder(tmp_path):
        pass


@pytest.mark.parametrize(
    ("changes", "age", "taken"),
    [
        ({}, 0, True),
        ({"pid": os.getppid(), "process_started": "1"}, 0, True),  # its number went to another
        ({"pid": os.getppid(), "process_started": ""}, 10**6, False),
        ({"host": "elsewhere"}, 0, False),
        ({"host": "elsewhere"}, lease.LIMIT - 20, False),
        ({"host": "elsewhere"}, lease.LIMIT + 20, True),
        ({"kernel": "another start"}, 0, False),
        ({"kernel": "another start"}, lease.LIMIT + 20, True),
    ],
)
def test_a_lease_ends_with_its_process_or_its_signs_of_life(tmp_path, changes, age, taken):
    path = stale(tmp_path, **changes)
    os.utime(path, (time.time() - age,) * 2)
    expected = contextlib.nullcontext() if taken else pytest.raises(InUse, match="in use by")
    before = path.read_text()
    with expected, of_folder(tmp_path):
        assert path.read_text() != before
    assert left_in(tmp_path) == ([] if taken else [NAME])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff"])
def test_a_damaged_lease_is_waited_for_and_ends(tmp_path, content):
    """It may be one that is being written, where there are no links."""
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(InUse, match=f"by whom is not said.*remove '{tmp_path / NAME}'"):
        with of_folder(tmp_path):
            pass
    os.utime(tmp_path / NAME, (time.time() - lease.LIMIT - 20,) * 2)
    with of_folder(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_holder_gives_signs_of_life_and_ends_when_it_lost_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.01)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    path = tmp_path / NAME
    with of_folder(tmp_path):
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 0)
        path.unlink()  # by hand, though it is alive
        wait_until(lambda: path.exists() and path.read_text())
        path.write_text(json.dumps({**lease._own(), "host": "elsewhere"}))
        wait_until(lambda: ended)
    assert set(ended) == {1} and left_in(tmp_path) == [NAME]  # that of the other


def wait_until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_where_there_are_no_links_a_lease_is_exclusive_too(tmp_path, monkeypatch):
    def link(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with of_folder(tmp_path):
        before = (tmp_path / NAME).read_bytes()
        with pytest.raises(FileExistsError):
            lease._create(tmp_path / NAME, tmp_path / "fresh", b"x")
        assert (tmp_path / NAME).read_bytes() == before
    assert left_in(tmp_path) == []


def test_leftovers_of_dead_processes_are_removed_and_no_others(tmp_path):
    with subprocess.Popen(["true"]) as ended:
        pass
    alive = os.getppid()
    for name in (f".a.{ended.pid}.partial", f".b.{ended.pid}.partial", f".a.{alive}.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / f".c.{ended.pid}.partial").touch()
    (tmp_path / f".c.d.{ended.pid}.partial").touch()
    reused = tmp_path / f".c.{alive}.partial"
    reused.touch()
    os.utime(reused, (0, 0))  # before that process began
    remove_leftovers(tmp_path / "a")
    assert left_in(tmp_path) == sorted(
        [f".b.{ended.pid}.partial", f".a.{alive}.partial", f".c.{ended.pid}.partial"]
        + [f".c.d.{ended.pid}.partial", reused.name]
    )
    write_atomically(tmp_path / "c", "x")
    assert f".c.{ended.pid}.partial" not in left_in(tmp_path) and not reused.exists()
    assert f".c.d.{ended.pid}.partial" in left_in(tmp_path)


def test_one_of_this_process_number_that_an_earlier_one_left_is_removed(tmp_path):
    """In containers numbers come again at once."""
    partial = partial_of(tmp_path / "a")
    partial.mkdir()
    os.utime(partial, (0, 0))
    remove_leftovers(tmp_path / "a")
    assert left_in(tmp_path) == []
