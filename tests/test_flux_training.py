"""From a diffusers folder and pictures to a student that draws: every stage, very small."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import made_records
import ml_dtypes
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image
from random_pipeline import save_random

from jax_distill import config as configuration
from jax_distill import main, pipeline, prepare, worlds
from jax_distill.assembly import build, frozen, resolution, stages
from jax_distill.config import ConfigError
from jax_distill.data.encoding import make
from jax_distill.data.pictures import read
from jax_distill.data.records import LatentRecords
from jax_distill.data.sources.folder import PictureFolder
from jax_distill.devices import sharding
from jax_distill.planning import program
from jax_distill.runs import checks, commands, experiment
from jax_distill.runs.porting import port
from jax_distill.training import loop
from jax_distill.worlds.flux.world import Flux, ported_config

ROOT = Path(__file__).parents[1]
SIZE, TALL = (32, 48), (64, 32)
LENGTH = 12
WORDS = ("red circle", "blue square", "green cross")


@pytest.fixture(scope="module")
def ported(tmp_path_factory):
    source = tmp_path_factory.mktemp("diffusers")
    save_random(source)
    output = tmp_path_factory.mktemp("ported") / "flux"
    port(str(source), output, dtype="bfloat16", text_length=LENGTH)
    return output


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(12):
        size = (60 + index, 50, 3)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(path / f"{index:02d}.png")
        (path / f"{index:02d}.txt").write_text(f"{index} times a {WORDS[index % 3]}\n")
    return path


@pytest.fixture(scope="module")
def prepared(ported, pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "latents"
    config = ported_config(ported)
    with config.unlocked():
        config.data.resolution = SIZE
    assert make(output, Flux(config).work(PictureFolder(pictures))) == 12
    return output


def flags(preset, ported, prepared, changes):
    sizes = {
        "total_steps": 2,
        "batch_size": 4,
        "rescale.total_steps": 2,
        "rescale.batch_size": 4,
        "log_every": 1,
        "samples.every": 2,
        "samples.prompts": 2,
        "samples.teacher_steps": 2,
        "evaluation.student_steps": "1",
        "evaluation.teacher_steps": "2",
        "data.resolution": f"{SIZE[0]},{SIZE[1]}",
        "data.path": prepared,
        "teacher.checkpoint": ported,
    }
    sizes |= dict(change.split("=") for change in changes)
    settings = [f"--config.{key}={value}" for key, value in sizes.items()]
    return [f"--config={ROOT}/configs/{preset}.py:flux_lite", *settings]


def train(patch, preset, ported, prepared, changes, workdir):
    """Runs the training command in this process; returns its error, if any."""
    argv = ["main", *flags(preset, ported, prepared, changes), f"--workdir={workdir}"]
    patch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver():
        try:
            commands.run(main.main)
        except SystemExit as stop:
            return stop.code


@pytest.fixture
def run(monkeypatch, ported, prepared):
    def run(preset, *changes, into):
        return train(monkeypatch, preset, ported, prepared, changes, into)

    return run


@pytest.fixture(scope="module")
def student(ported, prepared, tmp_path_factory):
    """A run of sCM with its rescale stage."""
    workdir = tmp_path_factory.mktemp("student") / "scm"
    with pytest.MonkeyPatch.context() as patch:
        assert not train(patch, "scm", ported, prepared, [], workdir)
    return workdir


def test_records_hold_what_the_encoders_make(ported, pictures, prepared):
    records = LatentRecords(prepared)
    world = pipeline.load(ported).world
    captions = [records[index].caption for index in (0, 7)]
    assert captions == ["0 times a red circle", "7 times a blue square"] and len(records) == 12
    text = world.encode([*captions, " "])
    for row, index in enumerate((0, 7)):
        image = read(pictures / f"{index:02d}.png", *SIZE)
        assert image.shape == (*SIZE, 3)
        latents = world.codec.encode(image[None])[0]
        np.testing.assert_allclose(records[index].latents, latents, atol=2e-3 * abs(latents).max())
        stored = records[index].sequence
        assert stored.dtype == ml_dtypes.bfloat16 and stored.shape == text.sequence[row].shape
        np.testing.assert_allclose(stored.astype("f4"), text.sequence[row], rtol=0.02, atol=0.02)
        np.testing.assert_allclose(
            records[index].pooled.astype("f4"), text.pooled[row], rtol=0.02, atol=0.02
        )
    np.testing.assert_allclose(
        records.null.pooled.astype("f4"), text.pooled[2:], rtol=0.02, atol=0.02
    )


def test_a_student_is_made_and_draws(student, tmp_path):
    for name in ("config.json", "metrics.jsonl", "report.html", "samples/step-000002.png"):
        assert (student / name).stat().st_size > 0, name
    assert not (student / "results.json").exists()  # this world is not scored
    compared = json.loads((student / "time_rescale" / "rescale.json").read_text())
    assert compared.keys() == {"unfitted", "refitted", "finetuned"}
    for values in compared.values():
        assert np.isfinite(list(values.values())).all()
        assert values["time_derivative"] < values["old_time_derivative"]
    losses = [json.loads(line)["loss"] for line in open(student / "metrics.jsonl")]
    assert len(losses) == 2 and np.isfinite(losses).all()

    output = tmp_path / "out.png"
    command = [sys.executable, "-m", "jax_distill.sample", f"--checkpoint={student}", "--steps=2"]
    command += ["--prompt=a red circle", "--prompt=two crosses", "--height=48", "--width=16"]
    command += ["--tile=32", "--batch_size=1", "--seed=3", f"--output={output}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and output.stat().st_size > 0, done.stderr


def test_the_teacher_keeps_its_type_and_the_student_is_float32(ported, student):
    teacher = pipeline.load(ported)
    assert {leaf.dtype for leaf in jax.tree.leaves(teacher.params)} == {jnp.dtype("bfloat16")}
    trained = pipeline.load(student)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained.params)} == {jnp.dtype("float32")}
    assert trained.world.folder == ported  # found through teacher.checkpoint
    stage = resolution.resolve(trained.config, teacher.config).stages[0]
    initial = stages.initial_network(stage, teacher.params["network"])
    shared = [name for name in initial if name != "time_embedder"]
    assert all(
        a is b
        for name in shared
        for a, b in zip(*(jax.tree.leaves(p[name]) for p in (initial, teacher.params["network"])))
    )
    wide = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16)}
    assert {leaf.dtype.name for leaf in frozen.narrowed(wide, "bfloat16").values()} == {"bfloat16"}
    assert frozen.narrowed(wide, "float32")["b"].dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def tall(prepared, tmp_path_factory):
    """Records like the prepared ones, of taller pictures."""
    records = LatentRecords(prepared)
    shape = (math.prod(TALL) // 256, records[0].latents.shape[1])
    rng = np.random.default_rng(0)
    rows = [
        records[index]._replace(latents=rng.standard_normal(shape).astype(np.float16))
        for index in range(8)
    ]
    facts = {"world": "flux", "resolution": list(TALL)}
    facts["encoders"] = records.description["encoders"]
    output = tmp_path_factory.mktemp("tall") / "latents"
    return made_records.write(output, rows, facts, null=records.null)


@pytest.mark.slow
def test_pictures_of_two_sizes_come_by_turns(monkeypatch, run, ported, prepared, tall, tmp_path):
    """Each size has its own program, with its tokens, their places and its time shift."""
    fitted, fit, sizes = [], loop.fit, []

    def watched(config, workdir, objective, *arguments, **options):
        fitted.append(objective)
        return fit(config, workdir, objective, *arguments, **options)

    def shard_batch(batch, mesh, shard=sharding.shard_batch):
        sizes.append(batch.x.shape[1])
        return shard(batch, mesh)

    monkeypatch.setattr(loop, "fit", watched)
    monkeypatch.setattr(sharding, "shard_batch", shard_batch)
    settings = [f"data.path={prepared},{tall}", "data.weights=1,1", "total_steps=4"]
    error = run("time_rescale", *settings, into=tmp_path / "run")
    assert not error
    assert [objective.network.grid for objective in fitted[0]] == [(2, 3), (4, 2)]
    world = worlds.of(configuration.load(tmp_path / "run"))
    assert [objective.time_shift for objective in fitted[0]] == [
        world.time_shift(n) for n in (6, 8)
    ]
    assert sorted(sizes) == [6, 6, 8, 8] and sorted(sizes[:2]) == [6, 8]
    losses = [json.loads(line)["loss"] for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 4 and np.isfinite(losses).all()


def test_a_plan_is_of_the_largest_size(ported, prepared, tall):
    config = ported_config(ported)
    with config.unlocked():
        config.name, config.data.path = "x", f"{prepared},{tall}"
        config.data.weights, config.data.resolution = (1.0, 1.0), SIZE
        config.objective = {"name": "flow_matching"}
    (stage,) = program.run_stages(config)
    assert tuple(stage.config.data.resolution) == TALL


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["data.weights=1"], "data.weights: 1 for 2 folders of data.path; give one for each"),
        (["data.weights=1,1,1"], "data.weights: 3 for 2 folders of data.path; give one for each"),
        (["data.weights=1,0"], "data.weights: (1, 0) is not a list of positive numbers"),
        (["data.weights=1,1", "batch_size=9"], "batch_size: 9 is more than the 8 examples there"),
        (
            ["data.weights=1,1", "data.resolution=64,32"],
            "have 6 tokens, where (64, 32) pixels",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mixtures_that_do_not_fit_are_refused(run, prepared, tall, tmp_path, changes, expected):
    error = run("scm", f"data.path={prepared},{tall}", *changes, into=tmp_path / "run")
    assert error.startswith("error: ") and expected in error and "\n" not in error
    assert not (tmp_path / "run").exists()


OTHERS = {"meanflow": 2, "imm": 2, "time_rescale": 1, "rcm": 2, "sprint": 2}
"""Presets with the number of their stages: those that learn a derivative by time rescale it."""
OTHERS |= dict.fromkeys(("dmd2", "tdm", "sid", "ladd"), 1)


@pytest.mark.parametrize("preset", OTHERS)
def test_other_presets_can_run_from_a_ported_folder(monkeypatch, run, ported, preset, tmp_path):
    ran = []
    monkeypatch.setattr(experiment, "run", lambda config, workdir: ran.append(config))
    blocks = ["objective.blocks=0,1"] if preset in ("ladd", "sprint") else []  # of a small teacher
    assert not run(preset, *blocks, into=tmp_path / "run")
    assert ran[0].world == "flux" and ran[0].objective.name == preset
    assert len(resolution.resolve(ran[0], pipeline.load(ported).config).stages) == OTHERS[preset]


def test_a_rescaled_run_is_a_teacher_like_its_ported_folder(student, run, tmp_path, monkeypatch):
    """Its students need no rescale, and find text encoders and autoencoder behind it."""
    teacher = student / "time_rescale"
    ran = []
    monkeypatch.setattr(experiment, "run", lambda config, workdir: ran.append(config))
    assert not run("scm", f"teacher.checkpoint={teacher}", into=tmp_path / "run")
    teacher_config = pipeline.load(teacher).config
    config = resolution.resolve(ran[0], teacher_config).config
    assert not stages.needs_rescale(config, teacher_config)
    assert worlds.of(config).folder == worlds.of(teacher_config).folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["teacher.checkpoint="], "teacher.checkpoint: missing; world='flux' needs a folder that"),
        (["teacher.checkpoint=no/where"], "teacher.checkpoint: 'no/where' is no workdir"),
        (["data.path="], "data.path: missing; make the folder with python -m jax_distill.prepare"),
        (["data.path=no/where"], "data.path: 'no/where' has no dataset.json"),
        (["data.resolution=40,48"], "data.resolution: (40, 48) is not a height and a width, mult"),
        (["data.resolution=48"], "data.resolution: (48,) is not a height and a width"),
        (["data.resolution=48,48"], "have 6 tokens, where (48, 48) pixels have 9; set data.resol"),
        (["data.resolution=48,32"], "are of (32, 48) pixels, data.resolution is (48, 32)"),
        (["data.text_length=9"], "data.text_length: 9 differs from the teacher's 12"),
        (["evaluation.every=5"], "evaluation.every: 5, but pictures of world='flux' are not scor"),
        (["samples.prompts=13"], "samples.prompts: 13 is more than the 12 examples there are"),
        (["world=shapes"], "world: 'shapes' is not that of the teacher"),
        (["batch_size=16"], "batch_size: 16 is more than the 12 examples"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_said_in_one_sentence(run, tmp_path, changes, expected):
    error = run("scm", *changes, into=tmp_path / "run")
    assert isinstance(error, str) and error.startswith("error: ") and "\n" not in error
    assert expected in error and not (tmp_path / "run").exists()


def test_a_network_of_other_widths_is_refused(ported, prepared):
    config = ported_config(ported)
    with config.unlocked():
        config.data.path, config.data.resolution = str(prepared), SIZE
        config.model.pooled_projection_dim = 8
    with pytest.raises(ConfigError, match="pooled_projection_dim: 8 must be the captions' 16"):
        checks.check_data(config)


def test_data_of_other_encoders_is_told(ported, prepared, tmp_path, caplog):
    config = ported_config(ported)
    with config.unlocked():
        config.data.path, config.data.resolution = str(prepared), SIZE
        config.samples.prompts = 1
    with caplog.at_level("WARNING", logger="absl"):
        Flux(config).check(LatentRecords(prepared), str(prepared))
        assert not caplog.records
        records = LatentRecords(prepared)
        records.description["encoders"]["autoencoder"] = "another"
        Flux(config).check(records, str(prepared))
    assert [
        f"prepared with the autoencoder of another folder than '{ported}'" in m
        for m in caplog.messages
    ] == [True]


def test_plain_networks_are_followed_as_they_are(ported):
    config = ported_config(ported)
    assert build.guided(config) is build.embedded_guidance
    with config.unlocked():
        config.model.guidance_embeds = False
    assert build.guided(config) is build.unguided


@pytest.mark.slow
def test_pictures_of_several_sizes_are_prepared_in_one_go(ported, pictures, tmp_path, capsys):
    output = tmp_path / "out"
    flags = [f"--checkpoint={ported}", f"--source={pictures}", f"--output={output}"]
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.setattr(sys, "argv", ["prepare", *flags, "--sizes=48x48,80x48,32x48"])
        with pytest.raises(SystemExit) as ended:
            commands.run(prepare.main)
    assert not ended.value.code
    path = f"{output}/48x48,{output}/80x48"  # heights of 60 to 71 to a width of 50
    command = f"train on them with --config.data.path={path} --config.data.weights=5,7"
    assert command in capsys.readouterr().out
    for size, count, tokens in (("48x48", 5, 9), ("80x48", 7, 15)):
        records = LatentRecords(output / size)
        assert len(records) == count and len(records[0].latents) == tokens


def test_preparing_says_what_is_missing(ported, pictures, tmp_path):
    def prepare(*flags):
        command = [sys.executable, "-m", "jax_distill.prepare", f"--output={tmp_path / 'out'}"]
        done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and not (tmp_path / "out").exists()
        return done.stderr

    source = f"--source={pictures}"
    assert "width: 40 is no multiple of 16" in prepare(
        source, f"--checkpoint={ported}", "--width=40"
    )
    assert "is not a ported folder" in prepare(source, f"--checkpoint={tmp_path}")
    assert "--checkpoint and --source go together" in prepare(source)
