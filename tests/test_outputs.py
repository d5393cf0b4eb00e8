"""Folders that commands make: whole or not at all, by one process, and no half as a source."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jax_distill import pipeline
from jax_distill.assembly import resolution
from jax_distill.config import base
from jax_distill.data.records import LatentRecords
from jax_distill.interop.readers import sources
from jax_distill.runs import exporting, porting
from jax_distill.storage import lease
from jax_distill.storage.files import FileError
from jax_distill.storage.lease import InUse
from jax_distill.storage.outputs import Stopped, made_in_tries, made_whole

ROOT = Path(__file__).parents[1]


def test_a_folder_is_whole_or_not_there(tmp_path):
    folder = tmp_path / "a" / "b"
    with made_whole(folder) as partial:
        (partial / "file").touch()
        assert not folder.exists()
    assert os.listdir(folder) == ["file"] and os.listdir(folder.parent) == ["b"]
    with pytest.raises(FileError, match="b' exists; remove it or choose another"):
        with made_whole(folder):
            pass
    with pytest.raises(KeyError), made_whole(tmp_path / "c") as partial:
        (partial / "file").touch()
        raise KeyError
    assert os.listdir(tmp_path) == ["a"]


def test_two_do_not_make_one_folder(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other:
        holder = {**lease._own(), "pid": other.pid, "process_started": ""}
        (tmp_path / ".a.lease.json").write_text(json.dumps(holder))
        with pytest.raises(InUse, match=f"--output: .*a' is in use by process {other.pid}"):
            with made_whole(tmp_path / "a"):
                pass
        assert os.listdir(tmp_path) == [".a.lease.json"]
        other.kill()
    with made_whole(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="a' was not made, by a signal; run the same command again"):
        with made_whole(tmp_path / "a") as partial:
            (partial / "file").touch()
            os.kill(os.getpid(), number)
    assert os.listdir(tmp_path) == [] and signal.getsignal(number) is before


def test_what_was_done_is_kept_for_the_next_try(tmp_path):
    folder, unfinished = tmp_path / "a", tmp_path / ".a.unfinished"
    with pytest.raises(KeyError), made_in_tries(folder):
        raise KeyError
    assert os.listdir(tmp_path) == []  # there was nothing to keep
    with pytest.raises(
        Stopped, match="a' is not finished, by a signal; run the same command to go"
    ):
        with made_in_tries(folder) as found:
            (found / "one").touch()
            os.kill(os.getpid(), signal.SIGTERM)
    assert os.listdir(tmp_path) == [unfinished.name] and os.listdir(unfinished) == ["one"]
    with pytest.raises(FileError, match="^data.path: .* is half made; make it whole and give that"):
        LatentRecords(unfinished)
    with made_in_tries(folder) as found:
        (found / "two").touch()
    assert os.listdir(tmp_path) == ["a"] and sorted(os.listdir(folder)) == ["one", "two"]
    with pytest.raises(FileError, match="a' exists; remove it or choose another"):
        with made_in_tries(folder):
            pass


KILLED = """
import os, sys
from pathlib import Path
from jax_distill.storage.outputs import made_whole
with made_whole(Path(sys.argv[1])) as partial:
    (partial / "file").touch()
    os.kill(os.getpid(), 9)
"""


def test_a_killed_process_leaves_no_source_and_the_next_removes_it(tmp_path):
    folder = tmp_path / "a"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT)
    assert killed.returncode == -9
    (left,) = tmp_path.glob(".a.*.partial")
    assert (left / "file").exists() and not folder.exists()
    readers = {
        "checkpoint": pipeline.load,
        "--checkpoint": lambda path: exporting.export(str(path), tmp_path / "out"),
        "--source": sources.locate,
        "--base": lambda path: porting.port("x", tmp_path / "out", base=str(path)),
        "data.path": LatentRecords,
        "teacher.checkpoint": lambda path: resolution.teacher_config(taught_by(path)),
    }
    for name, read in readers.items():
        for path in (left, left / "network"):
            with pytest.raises(FileError, match=f"^{name}: '{path}' is half made"):
                read(path)
    with made_whole(folder):
        assert not left.exists()
    assert os.listdir(tmp_path) == ["a"]


def taught_by(path):
    config = base()
    config.teacher.checkpoint = str(path)
    return config
