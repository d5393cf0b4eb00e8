"""Laws of the measures, on distributions whose distance and whose diversity are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from jax_distill.evaluation import measures, scoring, variety
from jax_distill.evaluation.benchmarks import shapes
from jax_distill.worlds.shapes import renderer
from jax_distill.worlds.shapes.detector import Found
from jax_distill.worlds.shapes.requests import Request

SPECTRUM = 0.7 ** np.arange(16)
PROMPTS = scoring.held_out(12)


def gaussian(seed, n, scales=SPECTRUM**0.5, mean=0.0):
    return mean + scales * np.random.default_rng(seed).normal(size=(n, len(scales)))


def bias(spectrum, n):
    """The expected distance of two sets of n from one Gaussian, to first order in 1/n."""
    pairs = np.outer(spectrum, spectrum) / np.add.outer(spectrum, spectrum)
    return (2 * spectrum.sum() + pairs.sum() + np.trace(pairs)) / n


def test_the_distance_of_two_gaussians():
    """Whose covariances do not commute: in two dimensions the root's trace has a closed form."""
    roots = np.array([[1.0, 0.0], [0.8, 0.5]]), np.array([[0.3, 0.4], [0.0, 1.5]])
    first, second = (
        np.random.default_rng(seed).normal(size=(200_000, 2)) @ root.T + mean
        for seed, (root, mean) in enumerate(zip(roots, ([0, 0], [0.5, -1])))
    )
    a, b = (root @ root.T for root in roots)
    root_trace = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    known = 1.25 + np.trace(a) + np.trace(b) - 2 * root_trace
    assert measures.frechet(first, second) == pytest.approx(known, rel=0.01)
    assert measures.frechet(second, first) == pytest.approx(measures.frechet(first, second))
    assert abs(measures.frechet(first, first)) < 1e-6


def test_two_sets_of_one_distribution_have_the_bias_that_is_stated():
    found = [measures.frechet(gaussian(i, 600), gaussian(100 + i, 600)) for i in range(40)]
    assert np.mean(found) == pytest.approx(bias(SPECTRUM, 600), rel=0.1)


def test_halves_of_one_set_tell_the_bias():
    found = [measures.floor(gaussian(i, 600), np.zeros(600)) for i in range(8)]
    assert np.mean(found) == pytest.approx(bias(SPECTRUM, 600), rel=0.1)


def test_halves_share_out_what_two_sets_have_in_common():
    """What belongs to a prompt is alike in two sets of the same prompts."""
    strata = np.repeat(np.arange(60), 10)
    prompts = 5 * gaussian(0, 60)[strata]
    first, *others = (gaussian(seed, 600) + prompts for seed in range(1, 10))
    known = np.mean([measures.frechet(first, other) for other in others])
    assert measures.floor(first, strata) == pytest.approx(known, rel=0.15)
    assert measures.floor(first, np.zeros(600)) > 5 * known


def test_pairs_in_latents_are_unbiased_for_any_number_of_pictures():
    rng = np.random.default_rng(0)
    for pictures in (2, 8):
        latents = 3 * rng.normal(size=(200, pictures, 16, 64))
        assert measures.pairwise(latents) == pytest.approx(3 * 2**0.5, rel=0.01)


def drawn(pictures):
    """The diversity of pictures whose latents are their pixels."""
    return measures.diversity_of(pictures / 127.5 - 1, pictures, PROMPTS)


def test_a_collapsed_generator_has_no_diversity():
    """Although all of its pictures are right."""
    one = measures.renders(PROMPTS, 1, 0)
    assert all(shapes.judge(image, p.request) for (image,), p in zip(one, PROMPTS, strict=True))
    assert drawn(np.repeat(one, 4, axis=1)) == (0, 0, 0, 0, 1)


def test_noise_is_not_diverse_in_what_is_read():
    noise = np.random.default_rng(0).integers(0, 256, (12, 4, 64, 64, 3), np.uint8)
    assert drawn(noise)[1:] == (0, 0, 0, 0)


def test_wrong_pictures_do_not_hide_a_collapse():
    right = np.repeat(measures.renders(PROMPTS, 1, 0), 2, axis=1)
    wrong = np.roll(measures.renders(PROMPTS, 4, 1), 2, axis=0)  # of another task's prompts
    wrong[..., :6, :6, :] = 0  # not of the world at all
    wrong[..., -6:, :, :] = 0
    assert drawn(np.concatenate([right, wrong], axis=1))[1:] == (0, 0, 0, 1)


def test_real_pictures_are_as_diverse_as_the_world_says():
    """A single object's place is uniform, its colour one of six."""
    prompts = [p for p in scoring.held_out(600) if p.request.task == "single_object"][:8]
    pictures = measures.renders(prompts, 40, 0)
    found = measures.diversity_of(pictures / 127.5, pictures, prompts)
    assert found.twice == 1 and found.color == pytest.approx(5 / 6, abs=0.03)
    low, high = renderer._SINGLE_RADIUS
    radius = np.random.default_rng(0).uniform(low, high, (2, 100_000, 1))
    room = 64 - 2 * (renderer._MARGIN + radius)
    places = (64 - room) / 2 + room * np.random.default_rng(1).random((2, 100_000, 2))
    known = np.linalg.norm(places[0] - places[1], axis=-1).mean()
    assert found.place == pytest.approx(known, rel=0.05)


def test_a_difference_is_that_of_the_objects():
    def circle(color, x, y, width=20):
        return shapes.described(Found("circle", color, x, y, width, width, width**2, 0.9))

    prompt = shapes.asked(Request("counting", (("circle", None, 2),)))
    first = [circle("red", 20, 20), circle("blue", 40, 40)]
    moved = [circle("red", 40, 40), circle("blue", 23, 24, 30)]
    assert variety.difference([first], [first[::-1]], prompt) == (0, 0, 0)
    assert variety.difference([first], [moved], prompt) == (2.5, 5, 1)
    named = shapes.asked(Request("colors", (("circle", "red", 1),)))
    assert variety.difference([first[:1]], [moved[:1]], named).color is None


class Codec:
    """Grey pictures of 8 x 8 for latents of one channel."""

    def encode(self, pictures):
        grey = pictures.reshape(len(pictures), 8, 8, 8, 8, 3).mean((2, 4, 5)) / 127.5 - 1
        return grey.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)


class Renderer:
    """A pipeline that draws real pictures of its captions, from the seed; or always the same."""

    def __init__(self, collapsed=False):
        self.config, self.seeds = None, []
        self._collapsed = collapsed
        self._requests = {p.caption: p.request for p in renderer.held_out_prompts()}
        self.world = SimpleNamespace(codec=self, resolution=(64, 64), encode=lambda x: x)
        self.encode = Codec().encode

    def __call__(self, captions, *, steps, seed, guidance=None):
        self.seeds.append(seed)
        pictures = []
        for index, caption in enumerate(captions):
            rng = np.random.default_rng((7, 7) if self._collapsed else (seed, index))
            pictures.append(renderer.picture(self._requests[caption], rng)[1])
        return np.stack(pictures)

    def latents(self, text, *, steps, seed, guidance=None):
        return self(text, steps=steps, seed=seed).reshape(len(text), 16, -1) / 127.5

    def decode(self, latents, height, width):
        return np.round(latents * 127.5).astype(np.uint8).reshape(-1, height, width, 3)


def test_a_yardstick_tells_the_teacher_from_a_collapsed_student():
    teacher, good, collapsed = Renderer(), Renderer(), Renderer(collapsed=True)
    yardstick = measures.Yardstick(Codec(), scoring.held_out(300), PROMPTS, pictures=4, seed=5)
    yardstick.draw_teacher(teacher, 50)
    real, known = yardstick.real(), yardstick.teacher(teacher, 50)
    found, same = yardstick.network(good, 1), yardstick.network(collapsed, 1)
    assert teacher.seeds == [5, 5] and good.seeds == [5, 6]  # its distance is from other noise
    assert found.diversity_share(known) == same.diversity_share(known) + 1 == 1
    for each in (known, found):
        assert each.to_real < 3 * real.to_real and each.to_teacher < 3 * known.to_teacher
    assert min(same.to_real, same.to_teacher) > 5 * max(found.to_real, found.to_teacher)


def test_few_prompts_have_no_distance():
    yardstick = measures.Yardstick(Codec(), PROMPTS, PROMPTS[::2], pictures=2)
    yardstick.draw_teacher(Renderer(), 50)
    for each in (yardstick.real(), yardstick.teacher(Renderer(), 50)):
        assert each.latents > 0 and (each.to_real, each.to_teacher) == (None, None)
