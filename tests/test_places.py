"""Places where nothing can be made are named before the work begins, with the cause."""

import errno
import os
from pathlib import Path

import pytest

from jax_distill.storage import lease
from jax_distill.storage.files import FileError
from jax_distill.storage.outputs import check_output, made_in_tries, made_whole

PLACES = {
    ".": "'.' is no name for a new folder; name a folder, such as --output=results",
    "/": "'/' is no name for a new folder",
    "a/..": "'a/..' is no name for a new folder",
    "/proc/x": "'/proc/x' cannot be written (No such file or directory at '/proc')",
    "file/x": "'file/x' cannot be written (Not a directory at 'file')",
    "file/x/y": "'file/x/y' cannot be written (Not a directory at 'file')",
    "link/x": "'link' is a link to nothing; give another folder",
    "x" * 300: f"{'x' * 300}' cannot be written ({os.strerror(errno.ENAMETOOLONG)} at '.')",
    "x" * 240: f"{'x' * 240}' cannot be written ({os.strerror(errno.ENAMETOOLONG)} at '.')",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nowhere")


@pytest.mark.parametrize("made", [made_whole, made_in_tries])
@pytest.mark.parametrize("place", PLACES)
def test_a_folder_that_cannot_be_made_is_refused_with_the_cause(place, made):
    with pytest.raises(FileError) as caught, made(Path(place)):
        pass
    assert str(caught.value).startswith("--output: ") and PLACES[place] in str(caught.value)
    assert sorted(os.listdir()) == ["file", "link"]


@pytest.mark.parametrize("place", ["/proc/x", "file/x", "file/x/y", "link/x", "x" * 300])
def test_so_are_a_workdir_and_a_file(place):
    expected = PLACES[place]
    with pytest.raises(FileError) as caught, lease.of_run(Path(place)):
        pass
    assert str(caught.value).startswith("--workdir: ")
    with pytest.raises(FileError) as caught:
        check_output(place)
    assert expected in str(caught.value) and sorted(os.listdir()) == ["file", "link"]


def test_a_folder_that_takes_no_file_is_not_said_to_be_in_use():
    with pytest.raises(FileError, match="^it: no file can be made in '/proc'; give another$"):
        lease._take(Path("/proc/.lease.json"), "it", "give another")
