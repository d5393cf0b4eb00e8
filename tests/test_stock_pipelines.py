"""Exported folders, loaded by `DiffusionPipeline.from_pretrained` alone, draw our pictures."""

import dataclasses
import functools
import json
import re

import diffusers.schedulers.scheduling_flow_match_euler_discrete as euler
import diffusers.utils.dynamic_modules_utils as dynamic_modules
import few_step
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from few_step import registered  # noqa: F401
from random_pipeline import TRANSFORMER, Sizes, save_random
from safetensors.torch import load_file
from tiny_runs import run_program, save_run

from jax_distill import config, pipeline
from jax_distill.assembly import build
from jax_distill.assembly.resolution import trained_config
from jax_distill.runs.exporting import export
from jax_distill.runs.porting import port

CAPTIONS = ["a red circle", "two crosses and a disc"]
HEIGHT, WIDTH, LENGTH, GUIDANCE = 32, 48, 24, 4.5
TEACHERS = {
    "dev": Sizes(),
    "schnell": Sizes(
        dataclasses.replace(TRANSFORMER, guidance_embeds=False), scheduler=(("shift", 1.0),)
    ),
}
TEACHERS["guided"] = TEACHERS["schnell"]  # by classifier-free guidance
OF_T, OF_T_AND_W = {"time_scale": 1.0}, {"time_scale": 1.0, "guidance_factor": 1.0}
PAIR = OF_T | {"interval_embeds": True}
STUDENTS = {
    "time_rescale": ({"name": "time_rescale"}, OF_T_AND_W),
    "scm": ({"name": "scm"}, OF_T),
    "meanflow": ({"name": "meanflow"}, PAIR),
    "imm": ({"name": "imm", "time_shift": 0.3}, PAIR | OF_T_AND_W),
    "imm_restart": ({"name": "imm", "sampler": "restart"}, PAIR),
}
NAMES = [*TEACHERS, *STUDENTS, *few_step.NAMES]
STUDENTS |= {name: (objective, {}) for name, objective in few_step.STUDENTS.items()}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where diffusers copies the code of a folder."""
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, registered):  # noqa: F811
    """A source that can be exported, and the folder that is made of it."""
    root = tmp_path_factory.mktemp("folders")

    @functools.cache
    def ported(name):
        save_random(root / f"{name}_source", TEACHERS[name])
        guidance = "cfg" if name == "guided" else "auto"
        port(str(root / f"{name}_source"), root / name, text_length=LENGTH, guidance=guidance)
        return root / name

    def trained(name):
        objective, model = STUDENTS[name]
        settings = config.load(ported("dev")).copy_and_resolve_references()
        with settings.unlocked():
            settings.objective = objective
            settings.model.update(model)
            settings.teacher.checkpoint = str(ported("dev"))
            settings.data.resolution = (HEIGHT, WIDTH)
        return save_run(root / name, settings)

    @functools.cache
    def make(name):
        source = ported(name) if name in TEACHERS else trained(name)
        export(str(source), root / f"{name}_out")
        return source, root / f"{name}_out"

    return make


def noise():
    shape = (2, HEIGHT * WIDTH // 256, TRANSFORMER.in_channels)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def renoise(patch, seed=0):
    """Our pipeline's noise of restarts, for diffusers' scheduler."""

    def restart_key(row):
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), row))[1]

    keys, counter = jax.vmap(restart_key)(jnp.arange(2)), iter(range(100))

    def draw(shape, **_):
        index = next(counter)
        fresh = [jax.random.normal(jax.random.fold_in(key, index), shape[1:]) for key in keys]
        return torch.from_numpy(np.array(fresh))

    patch.setattr(euler, "randn_tensor", draw)


def draw(pipe, steps, **options):
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(
        CAPTIONS,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        height=HEIGHT,
        width=WIDTH,
        latents=torch.from_numpy(noise()),
        max_sequence_length=LENGTH,
        output_type="np",
        **options,
    )
    return pictures.images


@functools.cache
def ours(source, steps):
    pipe = pipeline.load(source)
    sizes = {"height": HEIGHT, "width": WIDTH}
    guidance = GUIDANCE if build.takes_guidance(pipe.config) else None
    return pipe(CAPTIONS, steps=steps, noise=noise(), guidance=guidance, **sizes)


def sigmas_of(folder):
    """What the card gives diffusers, by the number of steps."""
    found = re.findall(r"`sigmas=(.*?)` in (\d)", (folder / "README.md").read_text())
    return {int(count): json.loads(sigmas) for sigmas, count in found}


def assert_same(theirs, expected, limit=1.0):
    difference = np.abs(255 * theirs - expected).max()
    print(f"differs by {difference:.3f} / 255")
    assert expected.std() > 20 and difference <= limit


@pytest.mark.parametrize("name", NAMES)
def test_the_pictures_are_ours(folders, name, monkeypatch):
    source, out = folders(name)
    pipe = DiffusionPipeline.from_pretrained(out, trust_remote_code=name in STUDENTS)
    renoise(monkeypatch)
    guided = {"negative_prompt": [" "] * 2, "true_cfg_scale": GUIDANCE} if name == "guided" else {}
    assert_same(draw(pipe, 2, sigmas=sigmas_of(out).get(2), **guided), ours(source, 2))
    assert ("true_cfg_scale=" in (out / "README.md").read_text()) == bool(guided)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", ["scm", *few_step.NAMES])
def test_a_few_steps_are_ours_with_the_sigmas_of_the_card(folders, name, steps, monkeypatch):
    """And without them where the card gives none."""
    source, out = folders(name)
    pipe = DiffusionPipeline.from_pretrained(out)
    needed = sigmas_of(out)
    assert set(needed) == few_step.card_sigmas(name)
    renoise(monkeypatch)
    assert_same(draw(pipe, steps, sigmas=needed.get(steps)), ours(source, steps))
    if steps in needed:
        renoise(monkeypatch)
        assert np.abs(255 * draw(pipe, steps) - ours(source, steps)).max() > 1


def test_code_of_a_folder_does_not_run_unasked(folders):
    for kind in (DiffusionPipeline, FluxPipeline):
        with pytest.raises(ValueError, match="Pass `trust_remote_code=True` to allow"):
            kind.from_pretrained(folders("meanflow")[1])


def test_a_flow_map_is_not_drawn_with_by_another_pipeline(folders):
    """Which would not tell it how far a step goes."""
    pipe = DiffusionPipeline.from_pretrained(folders("meanflow")[1], trust_remote_code=True)
    with pytest.raises(ValueError, match="is told its steps by its own pipeline"):
        draw(FluxPipeline(**pipe.components), 1)


def test_a_flow_map_embeds_in_float32_whatever_its_type(folders):
    out = folders("meanflow")[1]
    kinds = torch.float32, torch.bfloat16
    full, narrow = (
        DiffusionPipeline.from_pretrained(out, trust_remote_code=True, dtype=kind) for kind in kinds
    )
    embeddings = {}
    for pipe in (full, narrow):
        kept = embeddings.setdefault(pipe, [])
        pipe.transformer.norm_out.register_forward_pre_hook(
            lambda module, inputs, kept=kept: kept.append(inputs[1].float())
        )
        draw(pipe, 2)
    for expected, found in zip(embeddings[full], embeddings[narrow]):
        assert (found - expected).abs().max() < 2**-6 * expected.abs().max()


def test_bfloat16_can_keep_refitted_embedders(folders, tmp_path, monkeypatch):
    """By the card's second program: the embedding is that of float32, rounded."""
    out = folders("scm")[1]
    monkeypatch.setattr(FluxTransformer2DModel, "_keep_in_fp32_modules", None)
    plain, full = (
        FluxTransformer2DModel.from_pretrained(out / "transformer", dtype=kind).time_text_embed
        for kind in (torch.bfloat16, torch.float32)
    )
    kept = run_program(out, 1)["transformer"].time_text_embed
    times = torch.tensor([1000.0, 784.0])  # which bfloat16 has
    scales = torch.tensor([4500.0, 4500.0]).bfloat16()
    pooled = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = full(times, scales.float(), pooled.float())
    error = (kept(times.bfloat16(), scales, pooled).float() - expected).abs().max()
    lost = (plain(times.bfloat16(), scales, pooled).float() - expected).abs().max()
    print(f"kept: off by {error:.1e}, narrowed: {lost:.1e}")
    assert error <= 2**-8 * expected.abs().max() < lost


@pytest.mark.parametrize("name", ["scm", "meanflow"])
def test_a_narrow_export_is_rounded_but_for_its_embedders(folders, tmp_path, name):
    source, _ = folders(name)
    export(str(source), tmp_path / "wide", layout="safetensors")
    export(str(source), tmp_path / "out", dtype="bfloat16")
    objective = STUDENTS[name][0]["name"]
    port(str(tmp_path / "out"), tmp_path / "ported", objective=objective)
    export(str(tmp_path / "ported"), tmp_path / "narrow", layout="safetensors")
    wide, narrow = (load_file(tmp_path / x / "model.safetensors") for x in ("wide", "narrow"))
    scalars = ("timestep_embedder", "guidance_embedder")
    for key, expected in wide.items():
        if not any(scalar in key for scalar in scalars):
            expected = expected.bfloat16()
        assert narrow[key].dtype == expected.dtype and torch.equal(narrow[key], expected), key
    card = (tmp_path / "out/README.md").read_text()
    assert "- type: bfloat16; embedders of time, guidance and interval float32" in card
    kind = "bfloat16" if name == "meanflow" else "float32"  # which stock would narrow all of
    assert f"dtype=torch.{kind})" in card


@pytest.mark.parametrize("name", NAMES)
def test_what_is_ported_again_is_what_was_exported(folders, tmp_path, name):
    """Bit for bit, embedders and their factors as they were before they were refitted.

    And it is drawn from as it was.
    """
    source, out = folders(name)
    port(str(out), tmp_path / "ported")
    before, after = (trained_config(folder) for folder in (source, tmp_path / "ported"))
    for factor in ("time_scale", "guidance_factor", "interval_embeds"):
        assert before.model[factor] == after.model[factor]
    samplers = (
        build.objective(of, resolution=(HEIGHT, WIDTH)).sampled_by for of in (before, after)
    )
    assert next(samplers) == next(samplers)
    export(str(source), tmp_path / "first", layout="safetensors")
    export(str(tmp_path / "ported"), tmp_path / "second", layout="safetensors")
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
