"""Going on with a run: every setting has its class, and what is refused leaves all as it was."""

import hashlib
import re
import runpy
import shutil
from pathlib import Path

import jax
import made_records
import numpy as np
import pytest
from absl import logging
from regression import Regression, Source, frozen, parameters
from regression import small_config as unnamed

from jax_distill import config as configuration
from jax_distill.assembly import resolution
from jax_distill.config import ConfigError, base
from jax_distill.config.settings import flatten
from jax_distill.data import identity, records
from jax_distill.data.loader import batches
from jax_distill.runs import experiment, resuming
from jax_distill.runs.resuming import FREE, REFUSED, SAID
from jax_distill.training import acceptance, loop
from jax_distill.training.optimizer import learning_rate
from jax_distill.training.step import init_state, make_optimizers

ROOT = Path(__file__).parents[1]
ANOTHER = {  # of settings that are one of a few words
    **{"world": "flux", "dtype": "bfloat16", "ema_dtype": "bfloat16", "on_nonfinite": "skip"},
    **{"teacher.velocity": "rescaled", "teacher.guidance": "none", "lora.base": "int8"},
    **{"optimizer.name": "adamw", "optimizer.moments": "bfloat16", "model.remat": "full"},
    **{"optimizer.schedule": "trapezoid", "model.attention": "xla", "optimizer.frozen": "bias"},
}


def settings(name, preset=""):
    """The whole configuration of a run, as its workdir has it."""
    config = runpy.run_path(f"{ROOT}/configs/{name}.py")["get_config"](preset)
    if name not in ("teacher", "autoencoder"):
        config = resolution.resolve(config).config
    return config.copy_and_resolve_references().lock()


RUNS = {
    "scm": settings("scm"),
    "lora": settings("meanflow", "lora"),
    "imm": settings("imm"),
    "teacher": settings("teacher"),
    "autoencoder": settings("autoencoder"),
}


def changed(config, key):
    """The configuration with another value of a setting."""
    old = flatten(config.to_dict())[key]
    new = ANOTHER.get(key)
    if new in (None, old):
        if isinstance(old, bool):
            new = not old
        elif isinstance(old, int | float):
            new = old + 1
        elif isinstance(old, tuple | list):
            new = (*old[:-1], old[-1] + 1)
        elif old is None:
            new = 0.5
        else:
            new = "muon" if key == "optimizer.name" else f"{old}x"
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.update_from_flattened_dict({key: new})
    return other, old, new


def small_config(**changes):
    config = unnamed(**changes).copy_and_resolve_references()
    with config.unlocked():
        config.objective.name = "flow_matching"  # of a configuration that can be read back
    return config.lock()


def fingerprint(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def said(monkeypatch):
    """The lines that are logged."""
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    return lines


def taken(workdir, steps):
    """Makes a workdir one of a run that has taken so many steps, as far as its folders say."""
    (workdir / "checkpoints" / str(steps)).mkdir(parents=True)
    (workdir / "checkpoints" / str(steps) / "_CHECKPOINT_METADATA").write_text("{}")


def test_every_setting_has_a_row_and_stands_in_the_document():
    document = (ROOT / "docs/resuming.md").read_text()
    assert resuming.table() in document
    keys = resuming.known_keys()
    assert set(flatten(base().to_dict())) <= set(keys)
    for config in RUNS.values():
        assert set(flatten(config.to_dict())) <= set(keys)
    for key in keys:
        assert f"`{key}`" in resuming.table(), key


@pytest.mark.parametrize("run", RUNS)
def test_each_setting_is_free_said_or_refused(run, tmp_path, said):
    config = RUNS[run]
    configuration.save(config, tmp_path)
    before = fingerprint(tmp_path)
    kinds = set()
    for key in flatten(config.to_dict()):
        if key == "data.path":
            continue
        del said[:]
        other, old, new = changed(config, key)
        row = resuming.row_of(key, config)
        kinds.add(row and row.kind)
        if row is not None and row.kind == REFUSED:
            with pytest.raises(ConfigError) as caught:
                resuming.check(other, tmp_path)
            text = str(caught.value)
            assert f"of {key}=" in text and f"set --config.{key} back" in text, text
            assert not said and "\n" not in text
        else:
            resuming.check(other, tmp_path)
            lines = [line for line in said if line.startswith(f"{key}: ")]
            assert len(lines) == (row is not None and row.kind == SAID), (key, said)
    assert {FREE, SAID, REFUSED} <= kinds
    resuming.check(config, tmp_path)
    assert fingerprint(tmp_path) == before


def test_what_nothing_reads_may_change(tmp_path, said):
    configuration.save(RUNS["autoencoder"], tmp_path)
    resuming.check(changed(RUNS["autoencoder"], "model.num_layers")[0], tmp_path)
    resuming.check(changed(RUNS["autoencoder"], "lora.rank")[0], tmp_path)
    configuration.save(RUNS["scm"], tmp_path)
    resuming.check(changed(RUNS["scm"], "autoencoder.latent_channels")[0], tmp_path)
    assert not said


def test_a_players_section_that_is_new_was_the_students(tmp_path, said):
    configuration.save(RUNS["scm"], tmp_path)
    config = RUNS["scm"].copy_and_resolve_references()
    with config.unlocked():
        config.optimizers.fake = {"clip_norm": 0.5}
    resuming.check(config, tmp_path)
    assert [line.partition(";")[0] for line in said] == ["optimizers.fake.clip_norm: 1.0 -> 0.5"]
    with config.unlocked():
        config.optimizers.fake.moments = "bfloat16"
    with pytest.raises(ConfigError, match="of optimizers.fake.moments='float32' and not"):
        resuming.check(config, tmp_path)


def state_of(config):
    optimizers = make_optimizers(Regression(), config)

    def create():
        return init_state(Regression(), optimizers, parameters(), 0, config.ema_dtype)

    state = jax.eval_shape(create)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    return jax.tree.structure(state), shapes


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_may_change_leaves_the_state_its_shape(optimizer):
    config = small_config(optimizer__name=optimizer)
    before = state_of(config)
    own = [key for key in flatten(config.to_dict()) if "." not in key or "optimizer." in key]
    differ = set()
    for key in own:
        row = resuming.row_of(key, RUNS["scm"])
        if state_of(changed(config, key)[0]) != before:
            assert row.kind == REFUSED, key
            differ.add(key)
    assert {"ema_dtype", "optimizer.moments", "optimizer.frozen", "optimizer.name"} == differ


@pytest.mark.parametrize("run", ["scm", "autoencoder"])
def test_a_run_is_not_made_shorter_than_it_is(run, tmp_path, said):
    config = RUNS[run].copy_and_resolve_references()
    configuration.save(config, tmp_path)
    taken(tmp_path, 40)
    before = fingerprint(tmp_path)
    with config.unlocked():
        config.total_steps = 39
    with pytest.raises(ConfigError, match="total_steps: 39 is fewer than the 40 .* set it to 40"):
        resuming.check(config, tmp_path)
    configuration.save(config, tmp_path / "other")  # as older versions left it
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "other" / "checkpoints")
    with pytest.raises(ConfigError, match="total_steps: 39 is fewer than the 40"):
        resuming.check(config, tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    assert fingerprint(tmp_path) == before and not said
    config.total_steps = 40
    resuming.check(config, tmp_path)
    assert len(said) == 1 and said[0].startswith("total_steps: ")


@pytest.mark.parametrize(
    ("schedule", "step", "changes", "jumps"),
    [
        ("cosine", 600, {"total_steps": 900}, True),
        ("cosine", 300, {"total_steps": 1200}, False),
        ("trapezoid", 590, {"total_steps": 1200}, True),
        ("trapezoid", 100, {"total_steps": 1200}, False),
        ("trapezoid", 530, {"optimizer.decay_share": 0.1}, True),
        ("constant", 600, {"total_steps": 900}, False),
        ("constant", 50, {"optimizer.learning_rate": 0.1}, False),
        ("cosine", 400, {"optimizer.schedule": "trapezoid"}, True),
    ],
)
def test_rates_that_go_on_otherwise_are_said_with_their_numbers(
    schedule, step, changes, jumps, tmp_path, said
):
    config = RUNS["scm"].copy_and_resolve_references()
    with config.unlocked():
        config.optimizer.schedule, config.total_steps = schedule, 600
    configuration.save(config, tmp_path)
    taken(tmp_path, step)
    last = float(learning_rate(config.optimizer, 600)(step - 1))
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    resuming.check(config, tmp_path)
    (line,) = [line for line in said if line.startswith("the learning rate")]
    following = float(learning_rate(config.optimizer, config.total_steps)(step))
    numbers = [float(x) for x in re.findall(r"was (\S+) at step \d+ and is (\S+) after", line)[0]]
    np.testing.assert_allclose(numbers, [last, following], rtol=6e-3)
    assert f"at step {step} " in line and "optimizer.schedule=" in line
    assert ("trapezoid, and go on from before its fall" in line) == jumps, line


def write_data(folder, captions, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        records.LatentRecord(rng.standard_normal((4, 8)).astype(np.float16), c) for c in captions
    ]
    made_records.write(folder, rows, {"world": "none"})
    return folder


def on_data(path):
    config = RUNS["teacher"].copy_and_resolve_references()
    with config.unlocked():
        config.data.path = str(path)
    return config


CAPTIONS = ["a red circle", "two squares", "a blue cross"]


def test_data_is_known_by_what_it_holds(tmp_path, said):
    folder = write_data(tmp_path / "foxes", CAPTIONS)
    run = tmp_path / "run"
    acceptance.note_data(on_data(folder), run)
    configuration.save(on_data(folder), run)
    before = fingerprint(run)
    said.clear()
    resuming.check(on_data(folder), run)
    assert not said
    shutil.copytree(folder, tmp_path / "moved")
    resuming.check(on_data(tmp_path / "moved"), run)
    assert len(said) == 1 and re.search("data.path: .*foxes' -> .*moved'; the same 3 ex", said[0])
    for name, captions, seed in (("more", [*CAPTIONS, "a star"], 0), ("like", CAPTIONS, 1)):
        other = write_data(tmp_path / name, captions, seed)
        expected = (
            rf"data.path: .*{name}' holds other data \({len(captions)} .* with \(3 examples\)"
        )
        with pytest.raises(ConfigError, match=expected):
            resuming.check(on_data(other), run)
    shutil.rmtree(folder)
    write_data(folder, CAPTIONS, seed=1)  # as many, as long, at the same path
    with pytest.raises(ConfigError, match="data.path: .*other data .*; put the old data back"):
        resuming.check(on_data(folder), run)
    assert fingerprint(run) == before


def test_data_of_a_run_of_an_older_version(tmp_path, said):
    """It did not write down which data it had: that is told while the old folder is there."""
    folder = write_data(tmp_path / "foxes", CAPTIONS)
    run = tmp_path / "run"
    configuration.save(on_data(folder), run)
    shutil.copytree(folder, tmp_path / "moved")
    resuming.check(on_data(tmp_path / "moved"), run)
    assert "the same 3 examples" in said.pop()
    shutil.rmtree(folder)
    resuming.check(on_data(folder), run)  # the path has not changed; that it is gone, others say
    with pytest.raises(ConfigError, match="data.path: .*cannot be told .* old folder"):
        resuming.check(on_data(tmp_path / "moved"), run)
    with pytest.raises(ConfigError, match="data.path: .*cannot be told"):
        resuming.check(on_data(tmp_path / "nowhere"), run)


def test_data_that_the_run_made_may_be_named(tmp_path, said):
    run = tmp_path / "run"
    write_data(run / "data", CAPTIONS)
    configuration.save(on_data(""), run)
    resuming.check(on_data(run / "data"), run)
    assert "the same 3 examples" in said.pop()


def test_identity_is_that_of_the_manifest(tmp_path):
    """Which has checksums of all shards; none of these is read."""
    rows = [records.LatentRecord(np.zeros((4, 8), np.float16), str(i)) for i in range(40)]
    made_records.write(tmp_path / "a", rows, shard_records=1)
    found = identity.identity(tmp_path / "a")
    assert found["examples"] == 40
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for shard in (tmp_path / "b").glob("*.array_record"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert identity.identity(tmp_path / "b") == found
    rows[39].latents[3, 7] = 1
    made_records.write(tmp_path / "c", rows, shard_records=1)
    assert identity.identity(tmp_path / "c")["digest"] != found["digest"]


# What a workdir keeps.


def fit(workdir, config, source=None, stop=None):
    class Killed(Exception):
        pass

    def hook(step, params):
        del params
        if step == stop:
            raise Killed

    source = source or Source()
    try:
        return loop.fit(
            config, workdir, Regression(), parameters(), frozen(), source, hooks=[(1, hook)]
        )
    except Killed:
        return None


class Watched(Source):
    def __init__(self):
        self.read = []

    def __getitem__(self, index):
        self.read.append(int(index))
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run of twelve steps that was killed in its seventh: saved after four."""
    workdir = tmp_path_factory.mktemp("half")
    configuration.save(small_config(), workdir)
    fit(workdir, small_config(), stop=6)
    return workdir


def test_a_configuration_is_replaced_once_the_run_is_accepted(half, tmp_path):
    run = shutil.copytree(half, tmp_path / "run")
    before = (run / "config.json").read_bytes()
    for name in ("state", "data"):  # of the only checkpoint
        shutil.move(run / "checkpoints" / "4" / name, tmp_path / name)
    with pytest.raises(ValueError, match="checkpoint"):
        fit(run, small_config(total_steps=8))
    assert (run / "config.json").read_bytes() == before
    run = shutil.copytree(half, tmp_path / "whole")
    fit(run, small_config(total_steps=5))
    assert configuration.load(run).total_steps == 5
    fit(run, small_config(total_steps=5, log_every=7))  # a finished one
    assert configuration.load(run).log_every == 7


def test_another_batch_size_takes_the_next_examples(half, tmp_path):
    order = Watched()
    stream = batches(order, 1, seed=0)
    [next(stream) for _ in range(60)]
    run = shutil.copytree(half, tmp_path / "run")
    source = Watched()
    fit(run, small_config(total_steps=6, batch_size=10, data__threads=1), source)
    assert source.read[:20] == order.read[16:36]


def test_a_run_that_goes_on_as_it_was_writes_nothing(tmp_path):
    configuration.save(small_config(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    acceptance.accept(small_config(), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_run_that_begins_leaves_the_configuration_of_one_that_is_there(tmp_path):
    folder = write_data(tmp_path / "foxes", CAPTIONS)
    run = tmp_path / "run"
    experiment.begin(on_data(folder), run)
    assert acceptance.known(run)["records"] == identity.identity(folder)
    before = fingerprint(run)
    experiment.begin(on_data(tmp_path / "elsewhere"), run)
    assert fingerprint(run) == before
    experiment.begin(RUNS["scm"], tmp_path / "own")  # whose data is its own
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["config.json"]
