"""Folders of pictures with captions: what is found, how it is fitted, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from jax_distill.data import folder


def save(path, height=20, width=30):
    """A picture whose red grows from left to right and whose green from top to bottom."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width)
    image[..., 1] = np.linspace(0, 255, height)[:, None]
    Image.fromarray(image).save(path)


def test_captions_are_beside_their_pictures(tmp_path):
    for name in ("b.png", "a.jpg", "c.PNG"):
        save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"picture {name[0]}\n")
    (tmp_path / "notes.md").write_text("no picture")
    found = folder.find(tmp_path)
    assert [(f.path.name, f.caption) for f in found] == [
        ("a.jpg", "picture a"),
        ("b.png", "picture b"),
        ("c.PNG", "picture c"),
    ]


def test_captions_are_in_a_table(tmp_path):
    (tmp_path / "deep").mkdir()
    save(tmp_path / "deep" / "x.png")
    save(tmp_path / "not_listed.png")
    entry = {"file_name": "deep/x.png", "text": "a picture"}
    (tmp_path / folder.METADATA).write_text(json.dumps(entry) + "\n\n")
    assert folder.find(tmp_path) == [(tmp_path / "deep" / "x.png", "a picture")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no pictures"),
        ({"a.png": b""}, r"a.png' has no caption; write it into '.*a.txt'"),
        ({folder.METADATA: b"{}"}, "line 1: it is no JSON object with file_name and text"),
        ({folder.METADATA: b"[]\n"}, "line 1: it is no JSON object"),
        (
            {folder.METADATA: b'\n{"file_name": "no.png", "text": "x"}'},
            "line 2: there is no file '.*no.png'",
        ),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        folder.find(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        folder.find(tmp_path / "nothing")


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 16), (16, 48), (64, 64)])
def test_pictures_are_fitted_around_their_middle(tmp_path, height, width):
    path = tmp_path / "a.png"
    save(path, 200, 300)
    image = folder.read(path, height, width).astype(int)
    assert image.shape == (height, width, 3)
    # What is cut off is cut off on both sides alike, and nothing is stretched.
    scale = max(height / 200, width / 300)
    shown = np.array([height / scale / 200, width / scale / 300])
    for channel, axis in ((0, 1), (1, 0)):
        values = image[..., channel].mean(1 - axis)
        assert abs(values.mean() - 127.5) < 3
        assert abs((values[-1] - values[0]) / 255 - shown[axis]) < 0.12


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a picture")
    with pytest.raises(ValueError, match="a.png' cannot be read as a picture"):
        folder.find(tmp_path)
    with pytest.raises(ValueError, match="a.png' cannot be read as a picture"):
        folder.read(tmp_path / "a.png", 16, 16)
