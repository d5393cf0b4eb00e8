"""What is asked of a pipeline and what comes of it: bad numbers stop with their cause."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pipeline import CAPTIONS, tiny_pipeline

from jax_distill.assembly.draw_settings import MOST_STEPS
from jax_distill.evaluation import previews, scoring
from jax_distill.flow import Text
from jax_distill.models.finite import NotFinite, bad_rows, first_bad_array

SHAPE = (3, 16, 64)  # of the noise of CAPTIONS


@pytest.fixture(scope="module")
def student():
    return tiny_pipeline("scm")


def noise(**changes):
    array = np.zeros(SHAPE, np.float32)
    for row, value in changes.items():
        array[int(row[1:]), 3, 2] = value
    return array


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": float("nan")}, "guidance: nan is not a finite number of zero or more"),
        ({"guidance": -np.inf}, "guidance: -inf is not"),
        ({"guidance": np.float32(-1)}, "guidance: .*-1.* is not"),
        ({"guidance": 1e39}, "guidance: 1e[+]39 is not a finite"),  # in float32
        ({"guidance": "3"}, "guidance: '3' is not"),
        ({"guidance": [1.0, 2.0, 3.0]}, "guidance: .* is not"),
        ({"guidance": True}, "guidance: True is not"),
        ({"steps": 10**9}, f"steps: 1000000000 is more than {MOST_STEPS}"),
        ({"steps": 2.0}, "steps: 2.0 is not a whole number"),
        ({"steps": float("inf")}, "steps: inf is not a whole number"),
        ({"seed": 2**32}, "seed: 4294967296 is more than 4294967295"),
        ({"seed": -1}, "seed: -1 is not at least 0"),
        ({"batch_size": 0}, "batch_size: 0 is not at least 1"),
        ({"batch_size": -3}, "batch_size: -3 is not at least 1"),
        ({"batch_size": 1.5}, "batch_size: 1.5 is not a whole number"),
        ({"height": 0}, "height: 0 is not at least 1"),
        ({"height": 100}, "height: 100 is no multiple of 16"),
        ({"height": 10**9 * 16}, "height: 16000000000 is more than the 16384 pixels"),
        ({"width": 10**9}, "width: 1000000000 is more than the 16384 pixels"),
        ({"width": 64.0}, "width: 64.0 is not a whole number"),
        ({"tile": 33}, "tile: 33 is no positive multiple"),
        ({"tile": 0}, "tile: 0 is not at least 1"),
        ({"noise": noise(_1=np.nan)}, "noise: row 1 is not finite"),
        ({"noise": noise(_2=-np.inf)}, "noise: row 2 is not finite"),
        ({"noise": np.full(SHAPE, 1e300)}, "noise: row 0 is not finite in float32"),
        ({"noise": noise().astype(int)}, "noise: of type int64"),
        ({"noise": noise().astype(complex)}, "noise: of type complex128"),
        ({"noise": noise()[:2]}, r"noise: shape \(2, 16, 64\) where \(3, 16, 64\)"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_drawn(
    student, monkeypatch, settings, message
):
    monkeypatch.setattr(student, "_embed", lambda prompts: pytest.fail("captions are embedded"))
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        student(CAPTIONS, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "neither a caption nor a list"),
        (7, "neither a caption nor a list"),
        (["a circle", None], "number 1 is None"),
        (b"a circle", "number 0 is 97"),
        (["\udcff"], "not UTF-8 text"),
    ],
)
def test_captions_are_text(student, prompts, message):
    with pytest.raises(ValueError, match=f"^prompts: .*{message}"):
        student(prompts)


def test_noise_of_any_float_is_that_of_float32(student):
    given = np.random.default_rng(0).standard_normal(SHAPE)
    wide, narrow = (student(CAPTIONS, noise=given.astype(kind)) for kind in ("f8", "f4"))
    np.testing.assert_array_equal(wide, narrow)
    found = student(CAPTIONS, noise=jnp.asarray(given, jnp.bfloat16))
    rounded = np.asarray(jnp.asarray(given, jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(found, student(CAPTIONS, noise=rounded))


@pytest.fixture
def broken(student):
    """The student, one weight of which is NaN."""
    whole = student.params
    leaves, tree = jax.tree.flatten(whole)
    place = max(range(len(leaves)), key=lambda index: leaves[index].size)
    leaves[place] = jnp.asarray(leaves[place]).at[..., 0].set(jnp.nan)
    student.params = jax.tree.unflatten(tree, leaves)
    yield student
    student.params = whole


def test_weights_that_are_not_finite_draw_nothing(broken):
    with pytest.raises(NotFinite) as caught:
        broken(CAPTIONS)
    message = str(caught.value)
    assert message.startswith("picture 0 ('a red circle') and 2 more: its latents are not finite")
    assert first_bad_array(broken.params["network"]) in message
    with pytest.raises(NotFinite, match="^picture 0 and 2 more: its latents are"):
        broken.latents(broken.world.encode(CAPTIONS), steps=2)


def test_captions_whose_embedding_is_not_finite_draw_nothing(student):
    text = student.world.encode(CAPTIONS)
    pooled = np.array(text.pooled)
    pooled[1, 0] = np.inf
    with pytest.raises(NotFinite, match="^picture 1: its embedded caption is not finite; the text"):
        student.draw(Text(text.sequence, pooled), steps=2)


def test_pixels_that_are_not_finite_are_no_black_ones(student):
    tokens = np.zeros(SHAPE, np.float32)
    tokens[1] = 1e38
    with pytest.raises(NotFinite, match="^picture 1: decoded, its pixels are not finite; the lat"):
        student.world.codec.decode(tokens, 64, 64)
    student.world.codec.decode(tokens[:1], 64, 64)


def test_rows_that_are_not_finite_are_found():
    array = np.zeros((4, 2, 3), np.float32)
    assert bad_rows(array) == []
    array[1, 0, 2], array[3, 1, 1] = np.inf, np.nan
    assert bad_rows(array) == [1, 3]
    assert bad_rows(jnp.asarray(array, jnp.bfloat16)) == [1, 3]


def test_while_a_run_trains_pictures_that_are_not_finite_are_a_line(broken, tmp_path, caplog):
    """Nothing is scored or drawn then, and what is there stays."""
    path = tmp_path / scoring.SCORES
    path.write_text(json.dumps({"1": {"2": {"score": 0.5}}}))
    before = path.read_bytes()
    record = scoring.recorder(path, broken)
    with broken.config.unlocked():
        broken.config.evaluation.prompts = 6
        broken.config.evaluation.student_steps = (2,)
    with pytest.raises(NotFinite):
        record(3, broken.params)
    previews.under_way(record)(3, broken.params)
    assert path.read_bytes() == before
    said = [record.getMessage() for record in caplog.records]
    assert sum("step 3: nothing is drawn or scored; picture 0" in line for line in said) == 1
