"""Captions embedded while training: the rows are those that are prepared, and so is the run."""

import functools
import importlib.util
import json
import os
import pickle
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import made_records
import numpy as np
import pytest
from absl.testing import flagsaver
from captioned_runs import SIZE, fit, losses, world_of
from PIL import Image
from random_pipeline import save_random
from regression import Regression, Source, frozen, parameters, small_config
from test_flux_training import LENGTH, WORDS, train

from jax_distill import config as configuration
from jax_distill import prepare
from jax_distill.config import ConfigError
from jax_distill.data import records
from jax_distill.data.loader import EmbeddedLatents, TokenizedLatents, batches
from jax_distill.devices import sharding
from jax_distill.flow import Batch
from jax_distill.planning import chips, embedding, formulas, planner, table
from jax_distill.runs import checks
from jax_distill.runs.porting import port
from jax_distill.training import checkpoint, feed, loop, progress
from jax_distill.worlds.flux.world import Flux

ROOT = Path(__file__).parents[1]
CAPTIONS = [f"{index} times a {WORDS[index % 3]}" for index in range(12)]
TRAINING = "data.embedding=training"


@pytest.fixture(scope="module")
def ported(tmp_path_factory):
    source = tmp_path_factory.mktemp("diffusers")
    save_random(source)
    output = tmp_path_factory.mktemp("ported") / "flux"
    port(str(source), output, dtype="bfloat16", text_length=LENGTH)
    return output


@pytest.fixture(scope="module")
def folders(ported, tmp_path_factory):
    """The same latents with embedded captions, and with words alone."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((12, SIZE[0] * SIZE[1] // 256, 16)).astype(np.float16)
    world = world_of(ported)
    text, null = world.encode(CAPTIONS), world.encode([" "])
    half = functools.partial(jax.tree.map, lambda leaf: np.asarray(leaf, jax.numpy.bfloat16))
    embedded, words = (tmp_path_factory.mktemp("latents") / name for name in ("all", "words"))
    rows = [records.LatentRecord(x, caption) for x, caption in zip(latents, CAPTIONS)]
    description = {"world": "flux", "resolution": list(SIZE)}
    made_records.write(words, rows, description)
    rows = [
        row._replace(sequence=sequence, pooled=pooled)
        for row, sequence, pooled in zip(rows, *half(text))
    ]
    made_records.write(embedded, rows, description, null=half(null))
    return embedded, words


def assert_near(actual, expected):
    """Equal to the rounding of bfloat16: a bit or two of the largest, most to the bit."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=2**-6, atol=2**-8 * np.abs(expected).max())
    assert (actual == expected).mean() > 0.9


def test_embedded_rows_are_those_that_are_prepared(ported, folders):
    embedded, words = folders
    prepared = world_of(ported, path=str(embedded)).source(None).first
    tokenized = world_of(ported, path=str(words), embedding="training").source(None).first
    assert isinstance(prepared, EmbeddedLatents) and isinstance(tokenized, TokenizedLatents)
    (told, text), (asked, expected) = (x.captions([7, 0, 3]) for x in (tokenized, prepared))
    assert told == asked == [CAPTIONS[7], CAPTIONS[0], CAPTIONS[3]]
    jax.tree.map(assert_near, text, expected)
    jax.tree.map(assert_near, tokenized.null, prepared.null)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((text, tokenized.null))} == {"bfloat16"}

    mesh = sharding.make_mesh(sharding.ALL_FSDP)
    streams = [batches(x, 4, seed=1) for x in (tokenized, prepared)]
    for _ in range(3):
        found, wanted = (sharding.shard_batch(next(stream), mesh) for stream in streams)
        assert found.text.t5.dtype == np.int32 and found.text.t5.shape == (4, LENGTH)
        (found,) = tokenized.embedder.embed([found])
        assert isinstance(found, Batch) and prepared.embedder is None
        np.testing.assert_array_equal(found.x, wanted.x)
        jax.tree.map(assert_near, found.text, wanted.text)


def test_workers_of_a_loader_are_given_tokens_alone(ported, folders):
    source = world_of(ported, path=str(folders[1]), embedding="training").source(None).first
    assert source.null.pooled.shape == (1, 16)  # the text encoders, which are not passed on
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == 12
    jax.tree.map(np.testing.assert_array_equal, again[5], source[5])


@pytest.fixture(scope="module")
def sources(ported, folders):
    """That of embedded captions, and that of captions embedded while training."""
    embedded, words = folders
    training = world_of(ported, path=str(words), embedding="training").source(None)
    return world_of(ported, path=str(embedded)).source(None), training


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_that_on_embedded_captions(sources, tmp_path, accumulate):
    found, expected = (
        fit(source, tmp_path / name, accumulate=accumulate)
        for source, name in zip(sources, ("prepared", "training"))
    )
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)
    for a, b in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-5)


def test_a_run_that_goes_on_ends_with_the_same_parameters(sources, tmp_path):
    """Two batches are embedded at a time, of which it goes on with either."""
    whole = fit(sources[1], tmp_path / "whole")
    for steps in (1, 4, 6):
        parts = fit(sources[1], tmp_path / "parts", total_steps=steps)
    assert sources[1].embedder.together(4) == 2 and parts[1] == whole[1]
    jax.tree.map(np.testing.assert_array_equal, parts[0], whole[0])


@pytest.mark.slow
def test_adapters_are_trained_by_the_command(monkeypatch, ported, folders, tmp_path):
    """After their rescale stage, with micro-batches, pictures and a report."""
    changes = ["accumulate=2", "lora.rank=2", "rescale.total_steps=2", "samples.every=0"]
    workdir = tmp_path / "run"
    assert not train(
        monkeypatch, "scm", ported, folders[1], [*changes, "data.embedding=training"], workdir
    )
    assert (workdir / "time_rescale/rescale.json").exists()
    assert (workdir / "samples/step-000002.png").stat().st_size > 0
    assert np.isfinite(losses(workdir)).all()


class Shifting:
    """Adds one to batches on the mesh, `count` of them at a time; notes how it is called."""

    def __init__(self, count, order):
        self.count, self.order = count, order

    def together(self, batch_size):
        assert batch_size == 4
        return self.count

    def embed(self, batches):
        assert len(batches) == self.count and isinstance(batches[0].x, jax.Array)
        self.order.append("embedded")
        return [batch._replace(x=batch.x + 1) for batch in batches]


@pytest.mark.parametrize("count", [1, 3])
def test_the_next_captions_are_embedded_while_a_step_runs(monkeypatch, tmp_path, count):
    """The loop asks for them before it waits for the step's metrics; losses get what is made."""
    order, add = [], progress.Report.add

    def added(report, values):
        order.append("waited")
        add(report, values)

    class Shifted(Source):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            return batch._replace(x=batch.x + np.ones_like(batch.x))

    config = small_config(total_steps=5, log_every=5, checkpoint__every=5)
    start = Regression(), parameters(), frozen()
    expected = loop.fit(config, tmp_path / "plain", *start, Shifted())
    monkeypatch.setattr(progress.Report, "add", added)
    embedder = Shifting(count, order)
    found = loop.fit(config, tmp_path / "embedded", *start, Source(), embedder=embedder)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if count == 1:
        assert order == ["embedded", *["embedded", "waited"] * 4, "waited"]
    else:
        assert order == ["embedded", "waited", "waited", "embedded", *["waited"] * 3]


@pytest.mark.parametrize("taken", range(8))
def test_batches_embedded_together_are_the_same_wherever_a_run_goes_on(taken):
    """And the position of the stream is that of the batches given."""
    mesh, windows = sharding.make_mesh(sharding.ALL_FSDP), []

    class Noting(Shifting):
        def embed(self, batches):
            windows.append(np.stack([batch.x for batch in batches]))
            return super().embed(batches)

    plain, stream = (batches(Source(), 4, seed=2) for _ in range(2))
    expected = [next(plain).x + 1 for _ in range(12)]
    whole = feed.Feed(batches(Source(), 4, seed=2), mesh, 4, 0, Noting(3, []))
    positions = []
    for x in expected:
        np.testing.assert_array_equal(next(whole).x, x)
        positions.append(whole.get_state())
    assert positions == [{"examples": 4 * step} for step in range(1, 13)]
    every = list(windows)
    windows.clear()
    stream.set_state({"examples": 4 * taken})
    resumed = feed.Feed(stream, mesh, 4, taken, Noting(3, []))
    assert resumed.get_state() == {"examples": 4 * taken}
    for x, position in zip(expected[taken:], positions[taken:]):
        np.testing.assert_array_equal(next(resumed).x, x)
        assert resumed.get_state() == position
    np.testing.assert_array_equal(windows, every[taken // 3 :])


REFUSED = [
    ((), "words", "has no embedded captions; embed them while training with --config.data.embed"),
    ((TRAINING,), "none", "has no captions to embed (the first is ''); prepare pictures that"),
    (
        ("data.embedding=later",),
        "words",
        "data.embedding: 'later' is not one of prepared, training",
    ),
]


@pytest.mark.parametrize(("changes", "folder", "expected"), REFUSED, ids=lambda x: str(x)[:20])
def test_what_cannot_be_embedded_is_said_in_one_sentence(
    monkeypatch, ported, folders, tmp_path, changes, folder, expected
):
    path = folders[1]
    if folder == "none":
        found = records.LatentRecords(path)
        rows = [found[index]._replace(caption="") for index in range(len(found))]
        path = tmp_path / "latents"
        facts = {name: found.description[name] for name in ("world", "resolution")}
        made_records.write(path, rows, facts)
    error = train(monkeypatch, "scm", ported, path, changes, tmp_path / "run")
    assert expected in error and "\n" not in error and not (tmp_path / "run").exists()


def test_the_shapes_world_embeds_nothing_while_training(tmp_path):
    config = configuration.base()
    with config.unlocked():
        config.name, config.objective = "x", {"name": "flow_matching"}
        config.data.embedding = "training"
    with pytest.raises(ConfigError, match="data.embedding: .*world='shapes' .* set it to prepared"):
        checks.check(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="data.embedding: "):
        planner.make_plan(config, chips.parse("gpu:h200x1"))


def test_captions_are_prepared_as_words_alone(ported, monkeypatch, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(2):
        Image.new("RGB", (40, 30), (index, 9, 9)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(CAPTIONS[index])
    monkeypatch.setattr(Flux, "text_encoders", None)  # no text encoder is read
    settings = [f"--checkpoint={ported}", f"--source={pictures}", f"--output={tmp_path / 'words'}"]
    argv = ["prepare", *settings, "--embed=false", "--height=32", "--width=48"]
    with flagsaver.flagsaver():
        prepare.flags.FLAGS(argv)
        prepare.main(argv[:1])
    found = records.LatentRecords(tmp_path / "words")
    assert [found[index].caption for index in range(len(found))] == CAPTIONS[:2]
    assert found[0].sequence is None and not found.has_null


PROCESSES = """
    import os, sys
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count={devices}"
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import jax
    count, index = {count}, int(sys.argv[1])
    if count > 1:
        jax.distributed.initialize("localhost:{port}", count, index)
    from captioned_runs import fit, world_of
    source = world_of({ported!r}, path={folder!r}, embedding="training").source(None)
    fit(source, Path({workdir!r}))
"""


@pytest.mark.slow
def test_two_processes_end_with_the_parameters_of_one(ported, folders, tmp_path):
    """On two devices, bit for bit: captions are embedded by both, sharded."""
    found = {}
    for count in (1, 2):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            number = probe.getsockname()[1]
        found[count] = tmp_path / str(count)
        places = {"ported": ported, "folder": folders[1], "workdir": found[count]}
        places = {name: str(path) for name, path in places.items()}
        code = textwrap.dedent(PROCESSES).format(
            devices=2 // count, count=count, port=number, tests=str(ROOT / "tests"), **places
        )
        running = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(index)],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
            for index in range(count)
        ]
        try:
            errors = [process.communicate(timeout=900)[1] for process in running]
        finally:
            for process in running:
                process.kill()
        assert not any(process.returncode for process in running), errors
    one, two = (checkpoint.load_averaged(workdir) for workdir in found.values())
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert losses(found[1]) == losses(found[2])


MESH = """
    import json, os, sys
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    import jax, numpy as np
    from pathlib import Path
    from jax_distill.devices import sharding
    from jax_distill.flow import Batch
    from jax_distill.models import clip, t5
    from jax_distill.worlds.flux.embedding import BatchEmbedder
    from jax_distill.worlds.flux.text_encoders import shapes
    from jax_distill.worlds.flux.tokenizers import TokenIds

    configs = (
        clip.ClipConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                        num_attention_heads=2, max_position_embeddings=8),
        t5.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=4),
    )
    rng = np.random.default_rng(0)
    params = {
        name: jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes(config))
        for name, config in zip(("clip", "t5"), configs)
    }
    ids = TokenIds(rng.integers(0, 64, (8, 8), np.int32), rng.integers(0, 64, (8, 12), np.int32))
    made, report = [], {}
    for sizes in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
        devices = jax.devices()[: int(np.prod(sizes))]
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), devices)
        held = sharding.put(params, sharding.shard_state(params, mesh))
        embedder = BatchEmbedder(configs, held, dtype="float32", mesh=mesh)
        (batch,) = embedder.embed([Batch(None, sharding.shard_batch(ids, mesh))])
        text = batch.text
        kernel = held["t5"]["blocks"]["mlp_in"]["kernel"]
        made.append(jax.tree.map(lambda x: np.asarray(x, np.float32), text))
        report["x".join(map(str, sizes))] = [
            max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(made[-1], made[0])),
            kernel.addressable_shards[0].data.size / kernel.size,
            str(text.sequence.sharding.spec[0]),
        ]
    print(json.dumps(report))
"""


@pytest.mark.slow
def test_text_encoders_are_sharded_over_the_mesh_of_the_run():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MESH)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for name, (difference, held, spec) in report.items():
        assert difference < 2**-7 and "fsdp" in spec, name
        assert held == {"1x1x1": 1, "1x8x1": 1 / 8, "2x2x2": 1 / 4}[name]


def preset(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("flux_lite")


def test_plans_count_the_text_encoders():
    config, topology = preset("time_rescale"), chips.parse("gpu:h200x8")
    with config.unlocked():
        config.data.embedding, config.model.remat = "training", "none"
    plan = planner.make_plan(config, topology)
    held, captions = plan.held["text encoders"], plan.embedding
    assert held == pytest.approx(2 * (4.762e9 + 0.123e9) / 8, rel=0.01)  # T5-XXL's encoder, CLIP-L
    assert plan.peak == sum(plan.held.values()) + plan.temporaries
    # T5's blocks take two operations a parameter and token, and its attention a little more.
    blocks = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
    assert captions.flops == pytest.approx(2 * 64 * 256 * blocks, rel=0.03)
    assert captions.steps == 1  # eight captions on a chip as it is
    assert plan.step_seconds == plan.roofline.seconds + captions.roofline.seconds
    described = table.describe(plan)
    assert described.count("text encoders") == 2 and "of the others" in described
    assert plan.to_dict()["text_encoders"]["held_gib"] * 2**30 == pytest.approx(held)


def test_small_batches_are_planned_together():
    """Links carry the weights once for all of them."""
    config, plans = preset("time_rescale"), []
    with config.unlocked():
        config.data.embedding, config.data.text_length = "training", 256
    for size in (1, 8):
        with config.unlocked():
            config.batch_size = 8 * size
        topology, mesh = chips.parse("gpu:h200x8"), formulas.abstract_mesh((1, 8, 1))
        measured = functools.partial(planner.estimate, topology=topology, by=embedding)
        plans.append(embedding.plan(config, mesh, topology, measured))
    one, eight = plans
    assert (one.steps, eight.steps) == (8, 1) and one.held == eight.held
    assert eight.flops == pytest.approx(8 * one.flops)
    assert eight.roofline.ici == pytest.approx(8 * one.roofline.ici)
