"""Laws of the shape world: what it draws, what it keeps out of training, that it never changes."""

import hashlib
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from jax_distill.worlds.shapes import renderer
from jax_distill.worlds.shapes.renderer import (
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    Placed,
    held_out_prompts,
    sample,
)
from jax_distill.worlds.shapes.requests import TASKS, Request


@pytest.fixture(scope="module")
def examples():
    return [sample(0, index) for index in range(1500)]


def test_sample_is_random_access():
    forward = [sample(7, index) for index in range(4)]
    for index in (3, 0, 2, 1):
        again = sample(7, index)
        assert again.caption == forward[index].caption
        assert again.objects == forward[index].objects
        np.testing.assert_array_equal(again.image, forward[index].image)
    assert len({sample(seed, 0).objects for seed in range(8)}) == 8
    assert sample(7, 0, "test").objects != forward[0].objects


def test_sample_rejects_an_unknown_split():
    with pytest.raises(ValueError, match="split"):
        sample(0, 0, "validation")


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_agrees_with_supersampling(shape):
    obj = Placed(shape, "black", 30.3, 33.8, 9.6)
    fine = (np.arange(64 * 16) + 0.5) / 16
    inside = renderer.signed_distance(shape, fine - obj.x, fine[:, None] - obj.y, obj.radius) < 0
    oracle = inside.reshape(64, 16, 64, 16).mean((1, 3))
    drawn = np.zeros((64, 64))
    box, part = renderer.coverage(obj)
    drawn[box] = part
    assert np.abs(drawn - oracle).max() < 0.35  # worst at corners, where a distance is no area
    assert np.abs(drawn - oracle).mean() < 0.003
    assert drawn.sum() == pytest.approx(oracle.sum(), rel=0.03)


def test_shapes_have_similar_areas():
    areas = [renderer.coverage(Placed(shape, "red", 32, 32, 10))[1].sum() for shape in SHAPES]
    assert max(areas) < 1.3 * min(areas)


def test_triangle_points_up():
    _, inside = renderer.coverage(Placed("triangle", "red", 32, 32, 10))
    rows = inside.sum(1)
    assert rows[: len(rows) // 2].sum() < 0.5 * rows[len(rows) // 2 :].sum()


def test_objects_keep_their_margin_and_gap(examples):
    for example in examples:
        for obj in example.objects:
            assert 2 <= obj.x - obj.radius and obj.x + obj.radius <= 62
            assert 2 <= obj.y - obj.radius and obj.y + obj.radius <= 62
            low, high = (9, 14) if len(example.objects) == 1 else (8, 11)
            assert low <= obj.radius <= high
        for a, b in combinations(example.objects, 2):
            apart = max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius
            assert apart >= 3 - 1e-9


def test_pictures_hold_exactly_what_is_asked(examples):
    for example in examples:
        asked = [(s, c) for s, c, n in example.request.objects for _ in range(n)]
        assert len(asked) == len(example.objects)
        for (shape, color), obj in zip(asked, example.objects, strict=True):
            assert obj.shape == shape
            assert color in (None, obj.color)
        background = example.image[0, 0]
        assert np.ptp(background) == 0 and 228 <= background[0] <= 250
        for obj in example.objects:
            # The cross, the thinnest, is solid at its centre like all others.
            assert tuple(example.image[int(obj.y), int(obj.x)]) == COLORS[obj.color]


def test_relations_hold_in_the_picture(examples):
    seen = Counter()
    for example in examples:
        relation = example.request.relation
        if relation is None:
            continue
        first, second = example.objects
        right, down = first.x - second.x, first.y - second.y
        major, minor = {
            "left": (-right, down),
            "right": (right, down),
            "above": (-down, right),
            "below": (down, right),
        }[relation]
        assert major > 0 and abs(minor) < 0.35 * major
        seen[relation] += 1
    assert min(seen.values()) > 50 and len(seen) == 4


def test_training_mix(examples):
    shares = Counter(example.request.task for example in examples)
    for task, share in zip(TASKS, renderer.TRAINING_MIX, strict=True):
        assert shares[task] / len(examples) == pytest.approx(share, abs=0.04)
    for task in ("position", "counting"):
        colors = [e.request.objects[0][1] for e in examples if e.request.task == task]
        assert np.mean([color is None for color in colors]) == pytest.approx(0.57, abs=0.1)


def test_training_never_shows_what_is_held_out(examples):
    for example in examples:
        pairs = [(obj.color, obj.shape) for obj in example.objects]
        assert not HELD_OUT_PAIRS.intersection(pairs)
        if len(pairs) == 2:
            assert not renderer.held_out_combination(*pairs)
        assert not renderer.is_unseen(example.request)


def test_test_split_shows_what_is_held_out():
    tests = [sample(0, index, "test") for index in range(300)]
    drawn = {(obj.color, obj.shape) for example in tests for obj in example.objects}
    assert HELD_OUT_PAIRS <= drawn
    assert any(renderer.is_unseen(example.request) for example in tests)


def test_held_out_combinations_are_a_tenth_in_any_order():
    pairs = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS]
    combos = [(a, b) for a, b in combinations(pairs, 2) if a[1] != b[1]]
    held = [renderer.held_out_combination(a, b) for a, b in combos]
    assert 0.07 < np.mean(held) < 0.13
    assert held == [renderer.held_out_combination(b, a) for a, b in combos]


def test_held_out_prompts():
    prompts = held_out_prompts()
    assert Counter(p.request.task for p in prompts) == dict.fromkeys(TASKS, 100)
    assert len({p.caption for p in prompts}) == 600
    unseen = Counter(p.request.task for p in prompts if p.unseen)
    assert unseen == {"colors": 25, "color_attr": 40}
    for prompt in prompts:
        assert prompt.unseen == renderer.is_unseen(prompt.request)
        if prompt.request.task in ("position", "counting", "two_object", "single_object"):
            assert all(color is None for _, color, _ in prompt.request.objects)
    for task, least in zip(TASKS, (4, 6, 12, 24, 48, 100), strict=True):
        assert len({p.request for p in prompts if p.request.task == task}) >= least


def test_world_is_frozen():
    """Scores of different trainings compare only while the stream and the prompts stay as is."""

    def digest(lines):
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    assert digest(p.caption for p in held_out_prompts()) == "4aed4965c12a6b50"
    assert digest(sample(0, i).caption for i in range(100)) == "4719b3151b21c7b1"
    assert (
        digest(str([o.shape for o in sample(0, i).objects]) for i in range(100))
        == "9cead22e203d136d"
    )


def test_picture_draws_an_unseen_request():
    request = Request("colors", (("triangle", "blue", 1),))
    objects, image = renderer.picture(request, np.random.default_rng(0))
    assert [(o.shape, o.color) for o in objects] == [("triangle", "blue")]
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
