"""The programs of model cards draw our pictures, with torch and diffusers alone."""

import functools
import json

import diffusers.pipelines.flux.pipeline_flux as flux_pipeline
import diffusers.schedulers.scheduling_flow_match_euler_discrete as euler
import diffusers.utils.dynamic_modules_utils as dynamic_modules
import few_step
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from few_step import registered  # noqa: F401
from safetensors.numpy import save_file
from tiny_runs import (
    GUIDANCE,
    STUDENT,
    assert_same_pictures,
    programs,
    run_program,
    save_run,
    settings,
)
from tiny_runs import RUNS as OTHERS

from jax_distill import pipeline
from jax_distill.assembly import build
from jax_distill.flow import Text
from jax_distill.runs.exporting import export
from jax_distill.worlds.shapes import bundled
from jax_distill.worlds.shapes.world import embedded_codec

NAMES = [*OTHERS, *few_step.NAMES]
RUNS = OTHERS | {
    name: settings(objective, **STUDENT) for name, objective in few_step.STUDENTS.items()
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, registered):  # noqa: F811
    folder = tmp_path_factory.mktemp("runs")
    return {name: save_run(folder / name, config) for name, config in RUNS.items()}


def as_torch(x):
    return torch.from_numpy(np.array(x))


codec = functools.cache(embedded_codec)


class Drawing:
    """The same noise and captions for both sides."""

    known: dict = {}  # our pictures by workdir and steps

    def __init__(self, workdir, count=2):
        self.pipe, self.workdir = pipeline.load(workdir), workdir
        captions = ["a red circle", "two squares"][:count]
        self.text = Text(*map(jnp.asarray, self.pipe.world.encode(captions)))
        key = jax.random.key(1)
        self.keys = jax.random.split(key, count)
        shape = (count, *build.token_shape(self.pipe.config))
        self.noise = jax.random.normal(key, shape)

    def fresh(self, index, shape):
        """Our samplers' noise of a step."""
        draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape[1:]))
        return as_torch(draw(self.keys))

    def ours(self, steps):
        if (self.workdir, steps) not in self.known:
            guidance = jnp.full(len(self.noise), GUIDANCE)
            sample = jax.jit(build.objective(self.pipe.config).sample, static_argnums=6)
            params, null = self.pipe.params, self.pipe.world.null
            tokens = sample(params, self.noise, self.text, null, guidance, self.keys, steps)
            self.known[self.workdir, steps] = codec().decode(tokens, 64, 64)
        return self.known[self.workdir, steps]

    def theirs(self, folder, steps, monkeypatch):
        """Of the program that makes the network itself."""
        defined = run_program(folder)
        with monkeypatch.context() as patch:
            self.renoise(patch)
            inputs = (self.noise, self.text.sequence, self.text.pooled)
            pictures = defined["draw"](*map(as_torch, inputs), steps=steps, guidance=GUIDANCE)
        return np.stack([np.asarray(picture) for picture in pictures])

    def renoise(self, patch):
        """Our noise for diffusers' scheduler."""
        counter = iter(range(1000))
        same = lambda shape, **_: self.fresh(next(counter), shape)  # noqa: E731
        patch.setattr(euler, "randn_tensor", same)

    def of_pipeline(self, folder, monkeypatch):
        """Of the program with a pipeline of diffusers, for our captions and noise."""
        examples = {
            "sequence": self.text.sequence,
            "pooled": self.text.pooled,
            "null_sequence": self.pipe.world.null.sequence,
            "null_pooled": self.pipe.world.null.pooled,
        }
        examples = {name: np.array(x) for name, x in examples.items()}
        save_file(examples, folder / "examples.safetensors")
        # The pipeline packs 2x2 patches itself.
        latents = as_torch(self.noise).reshape(2, 4, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
        latents = latents.reshape(2, 16, 8, 8)
        with monkeypatch.context() as patch:
            patch.setattr(flux_pipeline, "randn_tensor", lambda *_, **__: latents)
            patch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(folder / "modules"))
            self.renoise(patch)
            pictures = run_program(folder)["pictures"]
        return np.stack([np.asarray(x) for x in pictures])


@pytest.mark.parametrize("name", NAMES)
def test_the_program_of_a_folder_draws_our_pictures(runs, tmp_path, name, monkeypatch):
    """In the card's own number of steps, its guidance, and with the scheduler of the folder."""
    export(str(runs[name]), tmp_path / "out", shard_bytes=100_000)
    assert len(list((tmp_path / "out/transformer").glob("diffusion*.safetensors"))) > 2
    drawing = Drawing(runs[name])
    steps = {"scm": 2, "time_rescale": 50, "flow_matching": 50} | few_step.STEPS
    steps = steps.get(name, 4)
    assert f"num_inference_steps={steps}," in programs(tmp_path / "out")[0]
    theirs = drawing.of_pipeline(tmp_path / "out", monkeypatch)
    assert_same_pictures(theirs, drawing.ours(steps))


@pytest.mark.parametrize("name", NAMES)
def test_the_program_of_a_single_file_draws_our_pictures(runs, tmp_path, name, monkeypatch):
    export(str(runs[name]), tmp_path / "out", layout="safetensors")
    drawing = Drawing(runs[name])
    some = {"scm": (1, 2, 4), "time_rescale": (8,), "flow_matching": (8,)}
    some |= dict.fromkeys(few_step.STUDENTS, (1, 2, 4))
    for steps in some.get(name, (4,)):
        theirs = drawing.theirs(tmp_path / "out", steps, monkeypatch)
        assert_same_pictures(theirs, drawing.ours(steps))


@pytest.mark.parametrize("name", ["scm", "meanflow"])
def test_a_student_of_1000_w_is_one_of_w_at_round_scales(runs, tmp_path, name, monkeypatch):
    export(str(runs[name]), tmp_path / "out", layout="t2i_distill")
    drawing, steps = Drawing(runs[name]), {"scm": 2, "meanflow": 4}[name]
    theirs = drawing.theirs(tmp_path / "out", steps, monkeypatch)
    assert_same_pictures(theirs, drawing.ours(steps))
    card = (tmp_path / "out/README.md").read_text()
    assert "guidance embedder: refitted for 1 w; it differs by at most" in card
    assert "at multiples of 0.5, which are the scales to draw with, and by up to" in card


def test_two_time_embedders_can_be_refitted(runs, tmp_path, monkeypatch):
    export(str(runs["meanflow"]), tmp_path / "out", layout="safetensors", scale=1000.0)
    drawing = Drawing(runs["meanflow"])
    theirs = drawing.theirs(tmp_path / "out", 4, monkeypatch)
    assert_same_pictures(theirs, drawing.ours(4))
    card = (tmp_path / "out/README.md").read_text()
    assert "TIME_SCALE = 1000.0" in card
    assert card.count("embedder: refitted for 1000 t; it differs by at most") == 2


def test_the_program_writes_pictures_of_the_captions(runs, tmp_path):
    export(str(runs["scm"]), tmp_path / "out", layout="safetensors")
    run_program(tmp_path / "out", name="__main__")
    assert len(list((tmp_path / "out").glob("*.png"))) == 8


def test_the_card_says_how_to_draw(runs, tmp_path):
    (runs["scm"] / "results.json").write_text(json.dumps({"student": {"2": {"score": 0.5}}}))
    export(str(runs["scm"]), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    for line in (
        "method: scm",
        "steps: 2",
        "guidance: 3.0, embedded: the network embeds 1000 w",
        "time: the network embeds 1000 t, as diffusers has it",
        "type: float32",
        "time embedder: refitted for 1000 t; it differs by at most",
        "score by steps: 0.500 in 2",
    ):
        assert f"- {line}" in card
    assert build.OBJECTIVES["scm"].summary in card
    assert all(method.summary for method in build.OBJECTIVES.values())


def test_the_embedded_teacher_is_exported(tmp_path):
    export("embedded", tmp_path / "out")
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "out/transformer")
    params, _ = bundled.load("teacher")
    kernel = params["image_in"]["kernel"]
    np.testing.assert_array_equal(model.x_embedder.weight.detach(), kernel.T)
