"""Laws of the checker: true pictures pass, other pictures, malformed ones and noise do not."""

import numpy as np
import pytest
from scipy import ndimage

from jax_distill.evaluation.benchmarks import geneval
from jax_distill.evaluation.benchmarks.shapes import asked, described, judge, score
from jax_distill.worlds.shapes.detector import Found, find_objects
from jax_distill.worlds.shapes.renderer import (
    COLORS,
    SHAPES,
    Placed,
    Prompt,
    coverage,
    held_out_prompts,
    picture,
    render,
)
from jax_distill.worlds.shapes.requests import TASKS, Request

CIRCLE = Placed("circle", "red", 20.0, 32.0, 9.0)
SQUARE = Placed("square", "blue", 44.0, 32.0, 9.0)


def ask(task, *objects, relation=None):
    return Request(task, objects, relation)


def satisfied(objects, request):
    """Whether objects, placed or found, are what is asked for."""
    found = [
        o
        if isinstance(o, Found)
        else Found(o.shape, o.color, o.x, o.y, o.width, o.height, o.width * o.height, 1.0)
        for o in objects
    ]
    return geneval.judge([described(each) for each in found], asked(request)).correct


def blurred(image, rng):
    """A fair autoencoder's damage: blur of 0.7 px and noise of 4 levels."""
    soft = ndimage.gaussian_filter(image.astype(float), (0.7, 0.7, 0))
    return np.clip(soft + rng.normal(0, 4, image.shape) + 0.5, 0, 255).astype(np.uint8)


def ragged(image, rng, amplitude):
    """Displaces the outlines by smooth random steps of `amplitude` px (standard deviation)."""
    shift = [ndimage.gaussian_filter(rng.normal(size=(64, 64)), 1.5) for _ in range(2)]
    where = np.mgrid[:64, :64] + amplitude * np.array([s / s.std() for s in shift])
    channels = [
        ndimage.map_coordinates(image[..., c].astype(float), where, order=1, mode="nearest")
        for c in range(3)
    ]
    return np.stack(channels, -1).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures():
    """Pictures of three renders of each held-out prompt: (request, objects, image)."""
    rng = np.random.default_rng(0)
    requests = [prompt.request for prompt in held_out_prompts()] * 3
    return [(request, *picture(request, rng)) for request in requests]


def test_true_renders_are_accepted(pictures):
    for task in TASKS:
        verdicts = [judge(image, request) for request, _, image in pictures if request.task == task]
        assert np.mean(verdicts) >= 0.995, task


def test_found_objects_are_the_placed_ones(pictures):
    for _, placed, image in pictures[::6]:
        found = find_objects(image)
        assert len(found) == len(placed)
        for obj in placed:
            near = min(found, key=lambda f: np.hypot(f.x - obj.x, f.y - obj.y))
            assert (near.shape, near.color) == (obj.shape, obj.color)
            assert np.hypot(near.x - obj.x, near.y - obj.y) < 0.5
            assert abs(near.width - obj.width) < 1
            assert near.confidence > 0.9
            assert near.area == pytest.approx(coverage(obj)[1].sum(), rel=0.05)


def test_blurred_renders_are_accepted(pictures):
    rng = np.random.default_rng(1)
    verdicts = [judge(blurred(image, rng), request) for request, _, image in pictures[::3]]
    assert np.mean(verdicts) >= 0.995


def test_ragged_outlines_are_tolerated(pictures):
    rng = np.random.default_rng(2)
    verdicts = [judge(ragged(image, rng, 0.4), request) for request, _, image in pictures[::6]]
    assert np.mean(verdicts) >= 0.97


def test_renders_of_another_request_are_refused(pictures):
    rng = np.random.default_rng(3)
    by_task = {task: [p for p in pictures if p[0].task == task] for task in TASKS}
    for task, group in by_task.items():
        verdicts = []
        for _, placed, image in group[::2]:
            found = find_objects(image)
            for pick in rng.integers(len(group), size=4):
                request = group[pick][0]
                if not satisfied(placed, request):
                    verdicts.append(satisfied(found, request))
        assert len(verdicts) > 100, task
        assert np.mean(verdicts) <= 0.02, task


def smoothed(rng, mean, spread, width):
    field = ndimage.gaussian_filter(rng.normal(size=(64, 64, 3)), (width, width, 0))
    return mean + spread * field / field.std()


NOISE = {
    "uniform": lambda rng: rng.uniform(0, 256, (64, 64, 3)),
    "gaussian": lambda rng: rng.normal(128, 60, (64, 64, 3)),
    "light gaussian": lambda rng: rng.normal(235, 40, (64, 64, 3)),
    "smoothed": lambda rng: smoothed(rng, 128, 60, 4),
    "light smoothed": lambda rng: smoothed(rng, 230, 60, 4),
    "blank": lambda rng: np.full((64, 64, 3), rng.integers(256)),
    "blank light": lambda rng: np.full((64, 64, 3), 240),
}


@pytest.mark.parametrize("kind", NOISE)
def test_noise_and_blanks_are_refused(kind):
    rng = np.random.default_rng(4)
    for _ in range(150):
        image = np.clip(NOISE[kind](rng), 0, 255).astype(np.uint8)
        assert find_objects(image) == []


def test_framed_noise_is_refused():
    """Noise inside a clean border: the background test alone would let it through."""
    rng = np.random.default_rng(5)
    accepted = 0
    for prompt in held_out_prompts()[::6]:
        image = np.full((64, 64, 3), 240.0)
        image[4:-4, 4:-4] = smoothed(rng, 235, 110, 4)[4:-4, 4:-4]
        accepted += judge(np.clip(image, 0, 255).astype(np.uint8), prompt.request)
    assert accepted == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_malformed_objects_do_not_count(shape):
    whole = Placed(shape, "red", 32.0, 32.0, 9.0)
    merged = render([whole, Placed(shape, "red", 43.0, 35.0, 9.0)])
    two_toned = render([whole, Placed(shape, "blue", 43.0, 35.0, 9.0)])
    half = render([whole])
    half[:, 32:] = 240
    hollow = render([whole])
    hollow[29:36, 29:36] = 240
    stretched = np.repeat(render([whole])[:, 16:48], 2, axis=1)
    tiny, huge = (
        render([Placed(shape, "red", 32, 32, 4)]),
        render([Placed(shape, "red", 32, 32, 22)]),
    )
    for image in (merged, two_toned, half, hollow, stretched, tiny, huge):
        assert shape not in [obj.shape for obj in find_objects(image)]


def test_an_upside_down_triangle_is_none():
    assert find_objects(render([Placed("triangle", "red", 32, 32, 10)])[::-1]) == []


def test_specks_are_ignored():
    image = render([CIRCLE])
    image[50:53, 50:53] = COLORS["black"]
    image[10, 40] = COLORS["red"]
    assert [obj.shape for obj in find_objects(image)] == ["circle"]


@pytest.mark.parametrize("color", COLORS)
def test_colors_tolerate_a_shift_and_refuse_a_stranger(color):
    image = render([Placed("square", color, 32, 32, 10)]).astype(int)
    inside = np.linalg.norm(image - 240, axis=-1) > 5
    shifted = image.copy()
    shifted[inside] += np.array([15, -15, 15])
    (obj,) = find_objects(np.clip(shifted, 0, 255).astype(np.uint8))
    assert obj.color == color
    grey = image.copy()
    grey[inside] = 130
    assert find_objects(grey.astype(np.uint8)) == []


def test_presence_allows_more_and_counting_does_not():
    three = render(
        [CIRCLE, Placed("circle", "red", 44, 14, 9), Placed("circle", "blue", 44, 48, 9)]
    )
    assert judge(three, ask("single_object", ("circle", None, 1)))
    assert judge(three, ask("counting", ("circle", None, 3)))
    assert not judge(three, ask("counting", ("circle", None, 2)))
    assert not judge(three, ask("counting", ("circle", None, 4)))
    assert not judge(three, ask("counting", ("circle", "red", 3)))


def test_attributes_must_be_on_the_asked_objects():
    image = render([CIRCLE, SQUARE])
    assert judge(image, ask("color_attr", ("circle", "red", 1), ("square", "blue", 1)))
    assert not judge(image, ask("color_attr", ("circle", "blue", 1), ("square", "red", 1)))
    assert judge(image, ask("colors", ("square", "blue", 1)))
    assert not judge(image, ask("colors", ("circle", "blue", 1)))
    assert not judge(image, ask("two_object", ("circle", None, 1), ("cross", None, 1)))


def test_one_object_cannot_carry_two_attributes():
    """Which GenEval's rules do not see, so that no prompt asks for it."""
    with pytest.raises(ValueError, match="circle and circle"):
        judge(render([CIRCLE]), ask("color_attr", ("circle", "red", 1), ("circle", "blue", 1)))
    requests = [prompt.request for prompt in held_out_prompts()]
    assert all(asked(request).include for request in requests)


@pytest.mark.parametrize(
    ("x", "y", "holds"),
    [
        (44, 32, {"left"}),
        (44, 38, {"left"}),
        (20, 54, {"above"}),
        (20, 10, {"below"}),
        (42, 54, {"left", "above"}),  # a diagonal lies in both of GenEval's cones
    ],
)
def test_position_follows_the_offset_of_centres(x, y, holds):
    image = render([CIRCLE, Placed("square", "blue", x, y, 8)])
    for relation in ("left", "right", "above", "below"):
        pair = ("circle", None, 1), ("square", None, 1)
        assert judge(image, ask("position", *pair, relation=relation)) == (relation in holds)
    assert judge(image, ask("position", *pair[::-1], relation="right")) == ("left" in holds)


def test_score_is_the_mean_of_tasks():
    right = Prompt("", ask("colors", ("circle", "red", 1)), False)
    wrong = Prompt("", ask("colors", ("circle", "blue", 1)), False)
    pair = Prompt("", ask("two_object", ("circle", None, 1), ("square", None, 1)), False)
    image = render([CIRCLE, SQUARE])
    result = score([image] * 5, [right, right, right, wrong, pair])
    assert result == {"score": 0.875, "tasks": {"two_object": 1.0, "colors": 0.75}}


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="one image per prompt"):
        score([render([CIRCLE])], [])
    with pytest.raises(ValueError, match="uint8"):
        find_objects(np.zeros((64, 64, 3)))
    with pytest.raises(ValueError, match="64"):
        find_objects(np.zeros((32, 32, 3), np.uint8))
