"""Folders of pictures with captions: what is found, how it is fitted, what is refused."""

import json
import os

import numpy as np
import pytest
from absl import logging
from PIL import Image

from jax_distill.data import pictures
from jax_distill.data.sources import folder
from jax_distill.data.sources.checking import checked
from jax_distill.storage.files import FileError


@pytest.fixture
def said():
    """The lines that are logged."""
    lines = []

    def keep(record):
        lines.append(record.getMessage())
        return True

    logging.get_absl_logger().addFilter(keep)
    yield lines
    logging.get_absl_logger().removeFilter(keep)


def find(path, resolution=(1, 1)):
    """The paths and captions that are found in a folder, once all pictures are decoded."""
    source = checked(folder.PictureFolder(path), resolution)
    examples = [source[index] for index in range(len(source))]
    assert all(example.key == source.key(index) for index, example in enumerate(examples))
    return [(path / example.key, example.caption) for example in examples]


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
    found = find(tmp_path)
    assert [(path.name, caption) for path, caption in found] == [
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
    assert find(tmp_path) == [(tmp_path / "deep" / "x.png", "a picture")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no pictures"),
        ({"a.png": b""}, r"a.png' has no caption; write it into '.*a.txt'"),
        ({folder.METADATA: b"{}"}, "line 1 does not hold .*missing required field `file_name`"),
        ({folder.METADATA: b"[]\n"}, "line 1 does not hold .*Expected `object`"),
        ({folder.METADATA: b'{"file_name": 3, "text": "x"}'}, r"Expected `str`, got `int`"),
        ({folder.METADATA: b'{"file_name": "a.png", "text": 2.5}'}, r"got `float` - at `\$.text`"),
        ({folder.METADATA: b'{"file_name": "a.png"'}, "line 1 is not valid JSON"),
        (
            {folder.METADATA: b'\n{"file_name": "/etc/hosts", "text": "x"}'},
            "line 2: .*leads out of",
        ),
        ({folder.METADATA: b'{"file_name": "b/../../c.png", "text": "x"}'}, "line 1: .*leads out"),
        ({folder.METADATA: b'{"file_name": "a\\u0000", "text": "x"}'}, "line 1: .* is missing"),
        ({folder.METADATA: b'{"file_name": "a\\nb", "text": "x"}'}, r"'a\\nb' is missing; restore"),
        ({folder.METADATA: b'{"file_name": ".", "text": "x"}'}, "line 1: file_name is empty"),
        ({folder.METADATA: b'{"file_name": "metadata.jsonl", "text": ""}'}, "caption is empty"),
        ({folder.METADATA: b'{"file_name": "metadata.jsonl", "text": "\\u0000"}'}, "NUL"),
        ({folder.METADATA: "fél".encode("latin-1")}, "metadata.jsonl' is not UTF-8"),
        ({"a.png": b"", "a.txt": b" \r\n"}, "a.txt': the caption is empty"),
        ({"a.png": b"", "a.txt": b"x" * 70000}, "a.txt': the caption has 70000 characters"),
        ({"a.png": b"", "a.txt": b"a fox\ra hen"}, "a.txt': the caption has CR inside"),
        ({"a.png": b"", "a.txt": "f\xe9e".encode("latin-1")}, "a.txt' is not UTF-8 text"),
        ({"a.png": b"", "metadata.csv": b""}, "metadata.csv' is empty; its first line names"),
        ({"captions.csv": b"file_name,text\na.png"}, "line 2 has 1 fields where .* names 2"),
        ({"captions.csv": b"file_name,text,text\n"}, "line 1: two columns have one name"),
        ({"captions.csv": b'file_name,text\n"a.png,x\n'}, "line 2 is not valid CSV"),
        ({"captions.csv": b"name,text\na.png,x"}, "line 2 .*missing .*`file_name`.*--image_col"),
        ({"captions.csv": b"file_name,text\n../a.png,x"}, "line 2: .*leads out of"),
        ({"captions.csv": b"", "metadata.jsonl": b""}, "has several tables .* keep one"),
        ({"a.heic": b""}, "has no pictures"),
        (
            {folder.METADATA: b'\n{"file_name": "no.png", "text": "x"}'},
            "line 2: '.*no.png' is missing",
        ),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        find(tmp_path / "nothing")


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 16), (16, 48), (64, 64)])
def test_pictures_are_fitted_around_their_middle(tmp_path, height, width):
    path = tmp_path / "a.png"
    save(path, 200, 300)
    image = pictures.read(path, height, width).astype(int)
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
        find(tmp_path)
    with pytest.raises(ValueError, match="a.png' cannot be read as a picture"):
        pictures.read(tmp_path / "a.png", 16, 16)


def test_captions_are_read_as_they_were_written(tmp_path):
    texts = {
        "a": "a f\xe9e\u2028 and\x0b a fox\r\nin the snow\r\n".encode(),
        "b": b"\xef\xbb\xbfa fox\n",
        "c": "a fox".encode("utf-16"),
    }
    for name, text in texts.items():
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(text)
    captions = [caption for _, caption in find(tmp_path)]
    assert captions == ["a f\xe9e\u2028 and\x0b a fox\nin the snow", "a fox", "a fox"]


def test_subfolders_are_searched_and_what_is_left_out_is_counted(tmp_path, said):
    names = ["z.png", "b/x.JFIF", "b/c/y.tif", "b/._x.png", ".cache/n.png", "__MACOSX/m.png"]
    for name in [*names, "h/1.gif", "h/2.gif"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        ending = ".jpg" if path.suffix == ".JFIF" else path.suffix
        save(path.with_name(f"made{ending}"))
        path.with_name(f"made{ending}").rename(path)
        path.with_suffix(".txt").write_text(name)
    for name in ("new.heic", "notes.md", "orphan.txt"):
        (tmp_path / name).write_text("?")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "link.png").symlink_to(tmp_path / "z.png")
    (tmp_path / "b" / "link.txt").symlink_to(tmp_path / "z.txt")
    entry = {"file_name": "2.gif", "text": "in a table"}
    (tmp_path / "h" / folder.METADATA).write_text(json.dumps(entry) + "\n" + json.dumps(entry))
    found = [(str(path.relative_to(tmp_path)), text) for path, text in find(tmp_path)]
    assert found == [
        ("z.png", "z.png"),
        ("b/link.png", "z.png"),
        ("b/x.JFIF", "b/x.JFIF"),
        ("b/c/y.tif", "b/c/y.tif"),
        ("h/2.gif", "in a table"),
        ("h/2.gif#2", "in a table"),
    ]
    counts = {line.split("': ", 1)[1].partition(", such as")[0]: line for line in said}
    assert set(counts) == {
        f"4 {folder._HIDDEN}",  # of ._x, its caption, and two folders
        f"1 {folder._LINK}",
        f"3 {folder._OTHER}",
        f"3 {folder._UNLISTED}",  # 1.gif and two captions
        f"1 {folder._REPEATED}",
    }
    assert "new.heic" in counts[f"3 {folder._OTHER}"]


def test_two_pictures_may_share_a_caption(tmp_path, said):
    for name in ("cat.jpg", "cat.png"):
        save(tmp_path / name)
    (tmp_path / "cat.txt").write_text("a cat")
    assert [caption for _, caption in find(tmp_path)] == ["a cat", "a cat"] and not said


def test_every_picture_is_decoded_and_those_that_fail_are_counted(tmp_path, said):
    for number in range(9):
        path = tmp_path / f"{number}.png"
        save(path)
        path.with_suffix(".txt").write_text("a picture")
        if number % 3 == 1:
            path.write_bytes(path.read_bytes()[:-40])
    os.remove(tmp_path / "8.txt")
    with pytest.raises(FileError, match=r"1.png' cannot be read.*\(and 3 more of 9 pictures\)$"):
        find(tmp_path)


def test_what_is_done_about_pictures_is_counted(tmp_path, said):
    for number in range(4):
        save(tmp_path / f"{number}.png", 20 + 10 * number, 40)
        (tmp_path / f"{number}.txt").write_text("a picture")
    find(tmp_path, (40, 30))
    assert said == [f"2 of 4 pictures {pictures.SMALL}, such as '{tmp_path / '0.png'}'"]


def test_a_pipe_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a picture")
    with pytest.raises(FileError, match="a.png' is no regular file"):
        find(tmp_path)
    os.remove(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(FileError, match="a.txt' is no regular file"):
        find(tmp_path)
    os.mkfifo(tmp_path / folder.METADATA)
    with pytest.raises(FileError, match="metadata.jsonl' is no regular file"):
        find(tmp_path)


def test_folders_may_be_as_deep_as_paths_are_long(tmp_path):
    deep, depth = os.open(tmp_path, os.O_RDONLY), 1200
    for _ in range(depth):
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    path = tmp_path.joinpath(*["d"] * depth, "a.png")
    try:
        save(path)
        path.with_suffix(".txt").write_text("a picture")
        assert find(tmp_path) == [(path, "a picture")]
    finally:  # pytest's own clearing is recursive
        for file in (path, path.with_suffix(".txt")):
            file.unlink(missing_ok=True)
        for parent in list(path.parents)[:depth]:
            parent.rmdir()
