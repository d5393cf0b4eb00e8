"""A run whose disk takes no more: one sentence, the last good checkpoint, nothing half written."""

import errno
import os
import resource
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_distill.storage import files
from jax_distill.storage.files import FileError, write_json
from jax_distill.storage.outputs import made_whole
from jax_distill.training import saving
from jax_distill.training.checkpoint import Checkpoints


class State(NamedTuple):
    step: Any
    players: dict


def state_of(step: int, size: int = 50_000) -> State:
    rng = np.random.default_rng(step)
    arrays = {f"{i}": jnp.asarray(rng.standard_normal(size).astype(np.float32)) for i in range(9)}
    return State(jnp.int32(step), {"student": {"params": arrays}})


def arrays_of(state: State) -> np.ndarray:
    return state.players["student"]["params"]["3"]


@pytest.fixture
def limit():
    """Sets how long a file may be, for this process; a real error of the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("stage", ["", "time_rescale"])
def test_a_checkpoint_that_has_no_room(tmp_path, limit, capfd, stage):
    folder = tmp_path / stage / "checkpoints"
    with pytest.raises(FileError) as found, saving.explained(tmp_path):
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, state_of(1), {"next_index": 1})
            checkpoints.wait()
            limit(20_000)
            try:
                checkpoints.save(2, state_of(2), {"next_index": 2})
                checkpoints.wait()
            finally:
                limit(resource.RLIM_INFINITY)
    assert f"last good checkpoint: '{folder / '1'}'; raise the limit" in str(found.value)
    assert "\n" not in str(found.value) and "files may not be as large" in str(found.value)
    assert "Traceback" not in capfd.readouterr().err and os.listdir(folder) == ["1"]
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(2, state_of(2), {"next_index": 2})
    with Checkpoints(folder) as checkpoints:
        step, saved = checkpoints.restore_latest(state_of(0))
    assert step == 2 and np.array_equal(arrays_of(saved.state), arrays_of(state_of(2)))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_every_error_of_a_full_disk_is_named_and_no_other(tmp_path, number):
    wrapped = RuntimeError(f"RESOURCE_EXHAUSTED: events.out: {os.strerror(number)}")
    for error in (OSError(number, os.strerror(number)), wrapped):
        with pytest.raises(FileError, match=f"'{tmp_path}': .*last good checkpoint: none yet"):
            with saving.explained(tmp_path):
                raise error
    for error in (OSError(errno.EIO, "x"), KeyError("x"), ValueError("RESOURCE_EXHAUSTED: x")):
        with pytest.raises(type(error)), saving.explained(tmp_path):
            raise error


def test_other_errors_of_a_disk_are_named_where_a_library_wraps_them(tmp_path):
    text = "UNKNOWN: Failed to write: Input/output error [os_error_code='5']"
    with pytest.raises(FileError, match=r"cannot be written \(Input/output error\); last good"):
        with saving.explained(tmp_path):
            raise RuntimeError(text)
    for error in (jax.errors.JaxRuntimeError(text), PermissionError(13, "x")):
        with pytest.raises(type(error)), saving.explained(tmp_path):
            raise error


def test_files_and_folders_that_have_no_room_leave_nothing(tmp_path, limit):
    write_json(tmp_path / "a.json", [1])
    limit(1000)
    with pytest.raises(FileError, match="a.json': files may not be as large.*same command again"):
        write_json(tmp_path / "a.json", list(range(9000)))
    with pytest.raises(FileError, match="--output: .*new': files may not be as large"):
        with made_whole(tmp_path / "new") as partial:
            (partial / "b").write_bytes(bytes(9000))
    with pytest.raises(FileError, match="new': files may not be as large"):
        with made_whole(tmp_path / "new"):
            raise RuntimeError("I/O error: File too large (os error 27)")
    assert files.read_json(tmp_path / "a.json", list) == [1]
    assert [path.name for path in Path(tmp_path).iterdir()] == ["a.json"]
