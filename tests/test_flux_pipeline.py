"""FLUX's pipeline from a ported folder: the pictures of diffusers' `FluxPipeline`, of any size."""

import dataclasses
import functools
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from random_pipeline import DYNAMIC, T5, TRANSFORMER, Sizes, save_random
from random_text import relative_error

from jax_distill import pipeline
from jax_distill.assembly import build
from jax_distill.interop.scheduler_config import followed
from jax_distill.runs.porting import port
from jax_distill.serving.drawing import Studio
from jax_distill.serving.parameters import Wanted
from jax_distill.worlds.flux import world

SIZES = {
    "dev": Sizes(),
    # Without guidance, a constant schedule.
    "schnell": Sizes(
        dataclasses.replace(TRANSFORMER, guidance_embeds=False, num_single_layers=2),
        scheduler=(("shift", 1.0),),
    ),
    "other": Sizes(
        dataclasses.replace(TRANSFORMER, num_layers=2, axes_dims_rope=(8, 4, 4)),
        t5=dataclasses.replace(T5, num_layers=1, num_heads=3),
        scheduler=(*DYNAMIC.items(), ("base_image_seq_len", 4), ("max_image_seq_len", 9)),
    ),
}
CAPTIONS = ["a red circle", "two crosses and a disc"]
HEIGHT, WIDTH = 32, 48
LENGTH = 24


@pytest.fixture(scope="module", autouse=True)
def quick():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """diffusers' pipeline, and ours of the same folder."""

    @functools.cache
    def make(name):
        source = tmp_path_factory.mktemp("diffusers")
        theirs = save_random(source, SIZES[name])
        ported = tmp_path_factory.mktemp("ported") / name
        port(str(source), ported, text_length=LENGTH)
        return theirs, pipeline.load(ported)

    return make


def noise(count=2, height=HEIGHT, width=WIDTH):
    shape = (count, height * width // 256, TRANSFORMER.in_channels)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def of_diffusers(pipe, steps, guidance=3.5):
    return pipe(
        CAPTIONS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(noise()),
        max_sequence_length=LENGTH,
        output_type="np",
    ).images


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("name", SIZES)
def test_pictures_are_those_of_diffusers(pairs, name, steps):
    theirs, ours = pairs(name)
    pictures = ours(CAPTIONS, steps=steps, height=HEIGHT, width=WIDTH, noise=noise())
    assert pictures.shape == (2, HEIGHT, WIDTH, 3) and pictures.std() > 20
    assert np.abs(pictures / 255 - of_diffusers(theirs, steps)).max() <= 1 / 255


@pytest.mark.parametrize("name", SIZES)
def test_captions_are_embedded_as_by_diffusers(pairs, name):
    theirs, ours = pairs(name)
    sequence, pooled, _ = theirs.encode_prompt(CAPTIONS, max_sequence_length=LENGTH)
    text = ours.world.encode(CAPTIONS)
    assert relative_error(text.sequence, sequence.numpy()) <= 1e-5
    assert relative_error(text.pooled, pooled.numpy()) <= 1e-5


def test_guidance_is_followed_where_the_network_takes_it(pairs):
    theirs, ours = pairs("dev")
    pictures = ours(CAPTIONS, steps=4, height=HEIGHT, width=WIDTH, noise=noise(), guidance=1.0)
    assert np.abs(pictures / 255 - of_diffusers(theirs, 4, guidance=1.0)).max() <= 1 / 255
    usual = ours(CAPTIONS, steps=4, height=HEIGHT, width=WIDTH, noise=noise())
    assert np.abs(pictures.astype(int) - usual).max() > 1


def test_a_picture_depends_on_its_prompt_seed_and_place_alone(pairs):
    _, ours = pairs("dev")
    draw = functools.partial(ours, steps=1, height=HEIGHT, width=WIDTH)
    together, one_by_one = (draw(CAPTIONS, batch_size=size).astype(int) for size in (2, 1))
    assert np.abs(together - one_by_one).max() <= 1
    assert np.abs(together - draw(CAPTIONS, seed=1)).max() > 1


def test_pictures_that_are_served_together_are_those_drawn_alone(pairs):
    _, ours = pairs("dev")
    resolution = (HEIGHT, WIDTH)
    batch = [Wanted("teacher", prompt, 2, 3, 3.5, resolution) for prompt in CAPTIONS]
    for prompt, drawn in zip(CAPTIONS, Studio({"teacher": ours}, 2).draw(batch)):
        alone = ours(prompt, steps=2, seed=3, guidance=3.5, height=HEIGHT, width=WIDTH)[0]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(drawn.png))), alone)


def test_sizes_that_do_not_fit_are_refused(pairs):
    _, ours = pairs("dev")
    with pytest.raises(ValueError, match="height: 40 is no multiple of 16 pixels"):
        ours("a", height=40)
    with pytest.raises(ValueError, match=r"noise: shape \(1, 6, 16\) where \(2, 6, 16\) is needed"):
        ours(CAPTIONS, height=HEIGHT, width=WIDTH, noise=noise(1))


def test_the_folder_decides_schedule_size_and_guidance(pairs):
    _, ours = pairs("dev")
    assert ours.world.resolution == (512, 512) and ours.config.evaluation.guidance == 3.5
    assert build.objective(ours.config).time_shift == pytest.approx(
        0.5 + 0.65 * (1024 - 256) / 3840
    )
    assert build.objective(pairs("schnell")[1].config).time_shift == 0.0


def test_schedules_are_followed_or_refused():
    kind = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert world.schedule_shift(followed(None), 4096) == pytest.approx(1.15)
    assert world.schedule_shift(followed({"_class_name": "SCMScheduler"}), 256) == pytest.approx(
        0.5
    )
    assert world.schedule_shift(kind | {"shift": 3.0}, 256) == pytest.approx(math.log(3))
    dynamic = kind | {"use_dynamic_shifting": True, "max_shift": 2.0}
    assert world.schedule_shift(dynamic, 4096) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="scheduler: use_karras_sigmas=True is not supported"):
        world.schedule_shift(kind | {"use_karras_sigmas": True}, 256)
