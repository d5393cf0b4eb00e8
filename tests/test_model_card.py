"""The program of a model card draws our pictures, with torch and diffusers alone."""

import functools
import json
import re

import diffusers.pipelines.flux.pipeline_flux as flux_pipeline
import diffusers.schedulers.scheduling_flow_match_euler_discrete as euler
import diffusers.schedulers.scheduling_scm as scheduling_scm
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from random_text import jit
from safetensors.numpy import save_file
from tiny_runs import GUIDANCE, RUNS, assert_same_pictures, programs, run_program, save_run

from jax_distill import build, embedded, pipeline
from jax_distill.exporting import export
from jax_distill.flow import Text
from jax_distill.interop.model_card import METHODS
from jax_distill.worlds.shapes import embedded_codec


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
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
            sample = jit(self.pipe.objective.sample, static_argnums=6)
            params, null = self.pipe.params, self.pipe.world.null
            tokens = sample(params, self.noise, self.text, null, guidance, self.keys, steps)
            self.known[self.workdir, steps] = codec().decode(tokens, 64, 64)
        return self.known[self.workdir, steps]

    def theirs(self, folder, steps, monkeypatch):
        counter = iter(range(steps + 1))
        same = lambda shape, **_: self.fresh(next(counter), shape)  # noqa: E731
        defined = run_program(folder)
        with monkeypatch.context() as patch:
            patch.setattr(scheduling_scm, "randn_tensor", same)
            patch.setattr(torch, "randn", same)
            inputs = (self.noise, self.text.sequence, self.text.pooled)
            pictures = defined["draw"](*map(as_torch, inputs), steps=steps, guidance=GUIDANCE)
        return np.stack([np.asarray(picture) for picture in pictures])


@pytest.mark.parametrize("layout", ["diffusers", "t2i_distill", "safetensors"])
def test_a_consistency_students_card_draws_our_pictures(runs, tmp_path, layout, monkeypatch):
    export(str(runs["scm"]), tmp_path / "out", layout=layout)
    drawing = Drawing(runs["scm"])
    for steps in (1, 2, 4) if layout == "diffusers" else (2,):
        theirs = drawing.theirs(tmp_path / "out", steps, monkeypatch)
        assert_same_pictures(theirs, drawing.ours(steps))


@pytest.mark.parametrize("name", ["meanflow", "imm", "imm_restart", "time_rescale"])
def test_other_cards_draw_our_pictures(runs, tmp_path, name, monkeypatch):
    export(str(runs[name]), tmp_path / "out", shard_bytes=100_000)
    assert len(list((tmp_path / "out/transformer").glob("*.safetensors"))) > 2
    drawing = Drawing(runs[name])
    for steps in (1, 3) if name == "meanflow" else (3,):
        theirs = drawing.theirs(tmp_path / "out", steps, monkeypatch)
        assert_same_pictures(theirs, drawing.ours(steps))


def test_a_plain_teachers_card_draws_our_pictures(runs, tmp_path, monkeypatch):
    export(str(runs["flow_matching"]), tmp_path / "out")
    drawing = Drawing(runs["flow_matching"])
    theirs = drawing.theirs(tmp_path / "out", 3, monkeypatch)
    assert_same_pictures(theirs, drawing.ours(3))


@pytest.mark.parametrize("layout", ["t2i_distill", "safetensors"])
def test_two_time_embedders_are_in_every_layout(runs, tmp_path, layout, monkeypatch):
    export(str(runs["meanflow"]), tmp_path / "out", layout=layout)
    drawing = Drawing(runs["meanflow"])
    theirs = drawing.theirs(tmp_path / "out", 1, monkeypatch)
    assert_same_pictures(theirs, drawing.ours(1))


@pytest.mark.parametrize("name", ["scm", "meanflow"])
def test_refitted_for_1000_t_it_draws_the_same(runs, tmp_path, name, monkeypatch):
    export(str(runs[name]), tmp_path / "out", scale=1000.0)
    drawing, steps = Drawing(runs[name]), {"scm": 2, "meanflow": 3}[name]
    theirs = drawing.theirs(tmp_path / "out", steps, monkeypatch)
    assert_same_pictures(theirs, drawing.ours(steps))
    assert "TIME_SCALE = 1000.0" in programs(tmp_path / "out")[0]
    card = (tmp_path / "out/README.md").read_text()
    assert float(re.search(r"differs by at most\s(\S+) of", card)[1]) < 1e-3


def test_diffusers_own_pipeline_draws_our_pictures(runs, tmp_path, monkeypatch):
    export(str(runs["scm"]), tmp_path / "out", scale=1000.0)
    drawing = Drawing(runs["scm"])
    examples = {"sequence": drawing.text.sequence, "pooled": drawing.text.pooled}
    save_file(
        {k: np.asarray(x) for k, x in examples.items()}, tmp_path / "out/examples.safetensors"
    )
    # The pipeline packs 2x2 patches itself.
    latents = as_torch(drawing.noise).reshape(2, 4, 4, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
    latents = latents.reshape(2, 16, 8, 8)
    monkeypatch.setattr(flux_pipeline, "randn_tensor", lambda *_, **__: latents)
    counter = iter(range(2))
    same = lambda shape, **_: drawing.fresh(next(counter), shape)  # noqa: E731
    monkeypatch.setattr(euler, "randn_tensor", same)
    program = programs(tmp_path / "out")[1]
    assert "guidance_scale=3.0," in program and "num_inference_steps=2," in program
    pictures = run_program(tmp_path / "out", 1)["pictures"]
    assert_same_pictures(np.stack([np.asarray(x) for x in pictures]), drawing.ours(2))


def test_the_program_writes_pictures_of_the_captions(runs, tmp_path):
    export(str(runs["scm"]), tmp_path / "out")
    run_program(tmp_path / "out", name="__main__")
    assert len(list((tmp_path / "out").glob("*.png"))) == 8


def test_the_card_says_how_to_draw(runs, tmp_path):
    (runs["scm"] / "results.json").write_text(json.dumps({"student": {"2": {"score": 0.5}}}))
    export(str(runs["scm"]), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    for line in (
        "method: scm",
        "steps: 2",
        "guidance: 3.0, embedded",
        "time: the network embeds 1 t",
    ):
        assert f"- {line}" in card
    assert "--time_scale=1000" in card and "score by steps: 0.500 in 2" in card
    assert set(METHODS) == set(build.OBJECTIVES)


def test_the_embedded_teacher_is_exported(tmp_path):
    export("embedded", tmp_path / "out")
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "out/transformer")
    params, _ = embedded.load("teacher")
    kernel = params["image_in"]["kernel"]
    np.testing.assert_array_equal(model.x_embedder.weight.detach(), kernel.T)
