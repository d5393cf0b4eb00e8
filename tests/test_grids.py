"""Laws of grids: pictures are shown pixel by pixel, texts keep to their place, files are whole."""

import os

import numpy as np
import pytest
from PIL import Image

from jax_distill.evaluation import grids
from jax_distill.evaluation.grids import CAPTION, save_grid, save_pictures

LONG = "a picture of a red circle to the left of an extraordinarily large dark square $x_1$ " * 9
WORD = "Donaudampfschifffahrtsgesellschaft" * 2


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def places(page, picture, scale):
    """All (y, x) where the picture, each pixel repeated `scale` times, stands in the page."""
    enlarged = picture.repeat(scale, 0).repeat(scale, 1)
    height, width = enlarged.shape[:2]
    inside = page[: page.shape[0] - height + 1, : page.shape[1] - width + 1]
    starts = np.argwhere((inside == enlarged[0, 0]).all(-1))
    return [
        (int(y), int(x))
        for y, x in starts
        if (page[y : y + height, x : x + width] == enlarged).all()
    ]


@pytest.mark.parametrize("size, scale", [((8, 8), 16), ((12, 48), 3), ((140, 150), 1)])
def test_each_picture_is_shown_once_unblurred_in_its_row_and_column(tmp_path, size, scale):
    rows = [noise(3, *size, seed=seed) for seed in range(2)]
    path = tmp_path / "made" / "grid.png"
    save_grid(
        path,
        rows,
        row_labels=["teacher, 50 steps", LONG],
        column_labels=["a", LONG, WORD],
        title=LONG,
    )
    page = read(path)
    at = np.array([[places(page, picture, scale) for picture in row] for row in rows])
    assert at.shape == (2, 3, 1, 2)  # found, and found once
    y, x = at[:, :, 0, 0], at[:, :, 0, 1]
    assert (y == y[:, :1]).all() and (x == x[:1]).all()
    assert (np.diff(y[:, 0]) >= scale * size[0]).all() and (np.diff(x[0]) > scale * size[1]).all()


def test_no_text_leaves_its_column_or_touches_a_picture(tmp_path):
    picture = noise(1, 16, 16)
    rows = [np.concatenate([picture] * 4)] * 2
    captions = [LONG, WORD, "short", "a\nb & <c> \\frac{1} $"]
    save_grid(tmp_path / "g.png", rows, row_labels=["one", WORD], column_labels=captions)
    page = read(tmp_path / "g.png").copy()
    found = places(page, picture[0], 8)
    assert len(found) == 8
    for y, x in found:
        page[y : y + 128, x : x + 128] = 255
    columns = sorted({x for _, x in found})
    top = min(y for y, _ in found)
    blank_rows = (page == 255).all((1, 2))
    for left, right in zip(columns, columns[1:]):
        assert (page[:, left + 128 : right] == 255).all()
    assert (page[top:, columns[0] :] == 255).all()  # nothing is written on pictures
    assert blank_rows[top - 8 : top].all()
    assert blank_rows[:8].all() and (page[:, -8:] == 255).all()
    for x in columns:  # and each caption is there
        assert (page[top - 30 : top, x : x + 128] < 128).any()


def test_wrapping_keeps_every_letter_and_the_width():
    for text in ("a red circle", WORD, f"see {WORD} on top of it", "two\nlines here", ""):
        lines = CAPTION.wrap(text, 120)
        assert "".join(lines).replace(" ", "") == "".join(text.split())
        assert all(0 < CAPTION.width([line]) <= 120 for line in lines)


def test_a_text_without_end_is_cut_with_an_ellipsis():
    lines = CAPTION.wrap(LONG, 120)
    assert len(lines) == grids.CAPTION_LINES and lines[-1].endswith("…")
    assert CAPTION.width(lines) <= 120


def test_one_picture_is_saved_as_it_is(tmp_path):
    picture = noise(1, 5, 7)
    save_pictures(tmp_path / "one.png", picture, ["anything"])
    np.testing.assert_array_equal(read(tmp_path / "one.png"), picture[0])


@pytest.mark.parametrize("count, columns", [(2, 2), (5, 3), (9, 3)])
def test_several_pictures_are_saved_in_reading_order(tmp_path, count, columns):
    pictures = noise(count, 8, 8)
    save_pictures(tmp_path / "several.png", pictures, [f"caption {i}" for i in range(count)])
    page = read(tmp_path / "several.png")
    found = [places(page, picture, 16) for picture in pictures]
    assert [len(place) for place in found] == [1] * count
    assert [place[0] for place in found] == sorted(place[0] for place in found)
    assert len({place[0][1] for place in found}) == columns


@pytest.mark.parametrize(
    "rows, labels, columns, message",
    [
        ([], [], None, "rows: no pictures"),
        ([noise(0, 8, 8)], ["a"], None, r"rows\[0\]: no pictures"),
        ([noise(2, 8, 8), noise(3, 8, 8)], ["a", "b"], None, r"rows\[1\] has shape"),
        ([noise(2, 8, 8) / 255.0], ["a"], None, "uint8, got .* float64"),
        ([noise(2, 8, 8)], ["a", "b"], None, "row_labels: 2 labels for 1 rows"),
        ([noise(2, 8, 8)], ["a"], ["x"], "column_labels: 1 labels for 2 columns"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, rows, labels, columns, message):
    with pytest.raises(ValueError, match=message):
        save_grid(tmp_path / "g.png", rows, row_labels=labels, column_labels=columns)
    assert not os.listdir(tmp_path)


def test_wrong_captions_and_file_types_are_named(tmp_path):
    with pytest.raises(ValueError, match="1 captions for 2 pictures"):
        save_pictures(tmp_path / "g.png", noise(2, 8, 8), ["a"])
    with pytest.raises(ValueError, match=r"out\.jpg.*\.png"):
        save_pictures(tmp_path / "out.jpg", noise(1, 8, 8), ["a"])
