"""Checkpoints: what comes back is what was saved, or it is refused."""

import errno
import json
import os
import resource
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_distill.training import checkpoint, damage
from jax_distill.training.checkpoint import Checkpoints


class Player(NamedTuple):
    params: dict
    ema: dict


class State(NamedTuple):
    step: Any
    players: dict


def state_of(step: Any, params: dict, ema: dict) -> State:
    return State(step, {"student": Player(params, ema)})


def player(state: State) -> Player:
    return state.players["student"]


def state_at(step: int) -> State:
    rng = np.random.default_rng(step)
    kernel = jnp.asarray(rng.standard_normal((32, 16)).astype(np.float32))
    half = jnp.asarray(rng.standard_normal(7), jnp.bfloat16)
    params = {"network": {"kernel": kernel, "half": half}}
    return state_of(jnp.int32(step), params, jax.tree.map(lambda x: x / 2, params))


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture
def run(tmp_path):
    """A workdir with checkpoints of steps 1, 2 and 3."""
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_at(step), {"next_index": step}, {"loss": [step / 3, 1]})
    return tmp_path


def latest(run):
    with Checkpoints(run / "checkpoints", keep=3) as checkpoints:
        return checkpoints.restore_latest(state_at(0))


def test_round_trip(run):
    step, saved = latest(run)
    assert step == 3 and same(saved.state, state_at(3))
    assert jax.tree.structure(saved.state) == jax.tree.structure(state_at(3))
    assert saved.position == {"next_index": 3} and saved.metrics == {"loss": [1.0, 1]}
    assert same(checkpoint.load_averaged(run), player(state_at(3)).ema)


def test_the_copy_is_taken_at_once(tmp_path):
    """The arrays are given away, and the dicts changed, while the files are being written."""
    forget = jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0)
    position, metrics = {"next_index": 5}, {"loss": [1.0, 2]}
    state = state_of(jnp.int32(5), {"a": jnp.ones((1024, 1024))}, {"a": jnp.ones(3)})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, state, position, metrics)
        position["next_index"], metrics["loss"] = 6, None
        forget(state)
        checkpoints.wait()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        saved = checkpoints.restore(5, like)
    assert np.all(player(saved.state).params["a"] == 1)
    assert saved.position == {"next_index": 5} and saved.metrics == {"loss": [1.0, 2]}


def test_none_yet(tmp_path):
    assert latest(tmp_path) is None
    with pytest.raises(ValueError, match="no complete checkpoint yet"):
        checkpoint.load_averaged(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoints; train it"):
        checkpoint.load_averaged(tmp_path / "elsewhere")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def delete(path):
    path.unlink()


def write_7_for_3(path):
    path.write_text(path.read_text().replace("3", "7"))


@pytest.mark.parametrize(
    ("item", "harm"),
    [
        ("state/ocdbt.process_0", cut),
        ("state/ocdbt.process_0", flip_a_bit),
        ("state/ocdbt.process_0", delete),
        ("state/_METADATA", cut),
        ("data/metadata", delete),
        ("data/metadata", write_7_for_3),
        ("progress/metadata", cut),
        ("progress/metadata", delete),
        ("progress", shutil.rmtree),
        ("state/manifest.ocdbt", cut),
        ("data/metadata", lambda path: path.write_text("[]")),
        ("progress/metadata", lambda path: path.write_text('{"metrics": {}}')),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, item, harm, caplog, capfd):
    path = run / "checkpoints" / "3" / item
    harm(largest(path) if harm is not shutil.rmtree and path.is_dir() else path)
    # What is sampled from need not be what is damaged. A reader changes nothing.
    average = checkpoint.load_averaged(run)
    assert same(average, player(state_at(2)).ema) or same(average, player(state_at(3)).ema)
    assert (run / "checkpoints" / "3").is_dir()
    caplog.clear()
    step, saved = latest(run)
    assert step == 2 and same(saved.state, state_at(2)) and saved.position == {"next_index": 2}
    assert f"{run / 'checkpoints' / '3'} is damaged" in caplog.text
    assert "going back to step 2" in caplog.text
    assert "Traceback" not in capfd.readouterr().err
    # It is out of the way: step 3 can be saved again, and counts.
    with Checkpoints(run / "checkpoints", keep=3) as checkpoints:
        assert checkpoints.latest == 2
        checkpoints.save(3, state_at(3), {"next_index": 3})
    assert latest(run)[0] == 3
    assert (run / "checkpoints" / "damaged-3").is_dir()


def other_shapes(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype), state)


def another_ema_dtype(state):
    ema = jax.tree.map(lambda x: x.astype(jnp.float16), player(state).ema)
    return state_of(state.step, player(state).params, ema)


def more_arrays(state):
    params = {**player(state).params, "adapters": jnp.zeros(3)}
    return state_of(state.step, params, player(state).ema)


def fewer_arrays(state):
    return state_of(state.step, player(state).params, {})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            other_shapes,
            r"players.student.ema.network.half has shape \(7,\) there and \(7, 2\) here",
        ),
        (another_ema_dtype, "players.student.ema.network.half is bfloat16 there and float16 here"),
        (more_arrays, "it has no players.student.params.adapters"),
        (fewer_arrays, "it has players.student.ema.network.half, which is not asked for"),
    ],
)
def test_another_state_is_refused_by_name_and_nothing_is_moved(run, change, named):
    with Checkpoints(run / "checkpoints", keep=3) as checkpoints:
        with pytest.raises(ValueError, match=f"3' holds another state: {named}; .*configuration"):
            checkpoints.restore_latest(change(state_at(0)))
    assert latest(run)[0] == 3


def test_a_damaged_checkpoint_of_another_state_is_damaged(run):
    """Nothing tells the two apart but the checkpoint itself."""
    with Checkpoints(run / "checkpoints", keep=4) as checkpoints:
        checkpoints.save(4, more_arrays(state_at(4)), {"next_index": 4})
    flip_a_bit(largest(run / "checkpoints" / "4" / "state" / "ocdbt.process_0"))
    assert latest(run)[0] == 3


FAULTS = [OSError(errno.EIO, "I/O"), MemoryError(), ValueError("UNKNOWN: [os_error_code='116']")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_an_error_that_passes_retires_no_checkpoint(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(damage, "PAUSES", (0, 0, 0))
    (tmp_path / "7").mkdir()
    left = [fault] * 4
    tried = []

    def restore(step):
        tried.append(step)
        if left:
            raise left.pop()
        return "state"

    with pytest.raises(damage.Unreadable, match="7' cannot be read for now .*it is kept") as found:
        damage.first_whole(tmp_path, [7, 5], restore)
    assert "\n" not in str(found.value) and tried == [7] * 4
    left[:] = [fault] * 3
    assert damage.first_whole(tmp_path, [7, 5], restore) == (7, "state")


def test_the_only_checkpoint_is_kept_when_files_cannot_be_opened(run, monkeypatch):
    """A real error, of the system, that TensorStore reports in its own words."""
    monkeypatch.setattr(damage, "PAUSES", (0,))
    for step in (1, 2):
        shutil.rmtree(run / "checkpoints" / str(step))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Checkpoints(run / "checkpoints", keep=3) as checkpoints:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # those that are open stay open
        try:
            with pytest.raises(damage.Unreadable, match="Too many open files"):
                checkpoints.restore_latest(state_at(0))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert latest(run)[0] == 3 and sorted(os.listdir(run / "checkpoints")) == ["3"]


def test_a_file_that_cannot_be_read_is_kept(run, monkeypatch):
    """Reading it fails with EIO, of which TensorStore tells nothing."""
    monkeypatch.setattr(damage, "PAUSES", (0,))
    path = run / "checkpoints" / "3" / "state" / "manifest.ocdbt"
    content = path.read_bytes()
    path.unlink()
    path.symlink_to("/proc/self/mem")
    for read in (latest, checkpoint.load_averaged):
        with pytest.raises(damage.Unreadable, match="Input/output error"):
            read(run)
    path.unlink()
    path.write_bytes(content)
    assert latest(run)[0] == 3


def test_nothing_that_was_set_aside_is_deleted(run):
    for _ in range(3):
        flip_a_bit(largest(run / "checkpoints" / "3" / "state" / "ocdbt.process_0"))
        assert latest(run)[0] == 2
        with Checkpoints(run / "checkpoints", keep=3) as checkpoints:
            checkpoints.save(3, state_at(3), {"next_index": 3})
    names = set(os.listdir(run / "checkpoints"))
    assert names == {"1", "2", "3", "damaged-3", "damaged-3-1", "damaged-3-2"}


def test_what_a_killed_save_left_is_ignored_and_removed(run):
    killed = run / "checkpoints" / "4.orbax-checkpoint-tmp"
    (killed / "state").mkdir(parents=True)
    (killed / "state" / "_METADATA").write_text("{")
    assert checkpoint.complete_steps(run) == [3, 2, 1]
    assert same(checkpoint.load_averaged(run), player(state_at(3)).ema)
    assert killed.exists()
    assert latest(run)[0] == 3
    assert not killed.exists()


class Flat(NamedTuple):
    """The state of earlier versions."""

    step: Any
    params: dict
    ema: dict


def test_a_checkpoint_of_the_layout_before_players_is_named(tmp_path):
    state = Flat(jnp.int32(1), *player(state_at(1)))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {"examples": 4})
    for read in (checkpoint.complete_steps, checkpoint.load_averaged):
        with pytest.raises(checkpoint.OldLayout, match="an earlier version"):
            read(tmp_path)
    with pytest.raises(checkpoint.OldLayout):
        checkpoint.is_finished(tmp_path, 1)
    assert os.listdir(tmp_path / "checkpoints") == ["1"]


def test_checksums_see_every_bit_and_no_sharding():
    state, position = state_at(1), {"next_index": 1}
    expected = checkpoint.checksums(state, position)
    assert json.loads(json.dumps(expected)) == expected
    assert set(expected) == {"step", "student.params", "student.ema", "data"}
    bits = np.asarray(player(state).params["network"]["kernel"]).view(np.uint32)
    total = bits.sum(dtype=np.uint32) + np.asarray(player(state).params["network"]["half"]).view(
        np.uint16
    ).sum(dtype=np.uint32)
    assert expected["student.params"] == total
    for bit in (0, 13, 31):
        flipped = bits.copy()
        flipped[3, 5] ^= np.uint32(1 << bit)
        kernel = jnp.asarray(flipped.view(np.float32))
        network = {**player(state).params["network"], "kernel": kernel}
        other = state_of(state.step, {"network": network}, player(state).ema)
        changed = checkpoint.checksums(other, position)
        assert {name for name in expected if changed[name] != expected[name]} == {"student.params"}
    assert checkpoint.checksums(state, {"next_index": 2})["data"] != expected["data"]
