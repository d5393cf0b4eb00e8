"""Laws of files: read as what they should be or refused, written whole or not at all."""

import errno
import json
import os
from typing import NotRequired, TypedDict

import pytest

from jax_distill.storage import files, outputs
from jax_distill.storage.files import (
    FileError,
    read_json,
    read_json_lines,
    read_lines,
    read_text,
    write_atomically,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.png"
    write_atomically(path, b"old")
    moves = []

    def interrupted(source, target):
        moves.append((path.read_bytes(), open(source, "rb").read()))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert moves == [(b"old", b"new")]  # until the move the old file is untouched
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.png"]


def test_text_and_json_are_written_into_a_new_folder(tmp_path):
    write_atomically(tmp_path / "a" / "b.txt", "größer\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "größer\n".encode()
    write_json(tmp_path / "c.json", {"x": [1, 2]})
    assert json.loads((tmp_path / "c.json").read_text()) == {"x": [1, 2]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_read_whatever_the_locale(tmp_path, monkeypatch, encoding):
    path = tmp_path / "a.txt"
    text = "größer 狐\x85\u2028\x0b same line\r\nsecond\n"
    path.write_bytes(text.encode(encoding))
    monkeypatch.setenv("LC_ALL", "C")
    assert read_text(path) == text
    assert list(read_lines(path)) == [(1, "größer 狐\x85\u2028\x0b same line"), (2, "second")]


@pytest.mark.parametrize(
    "content", ["Füchse".encode("latin-1"), "a fox".encode("utf-16-le"), b"\x00", b"\xff\xfe\x00"]
)
def test_what_is_no_text_is_named(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    for read in (read_text, lambda path: list(read_lines(path))):
        with pytest.raises(FileError, match=r"a\.txt' is not UTF-8 text .*save it as UTF-8"):
            read(tmp_path / "a.txt")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        for read in (read_text, lambda path: list(read_lines(path)), read_json):
            with pytest.raises(FileError, match="no regular file"):
                read(path)


def test_long_texts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "TEXT_BYTES", 8)
    (tmp_path / "a").write_text("1234567\n" * 3)
    assert len(list(read_lines(tmp_path / "a"))) == 3
    (tmp_path / "b").write_text("123456789")
    for read, path in ((read_text, "a"), (lambda path: list(read_lines(path)), "b")):
        with pytest.raises(FileError, match="longer than"):
            read(tmp_path / path)


class Fox(TypedDict):
    name: str
    legs: NotRequired[int]
    den: dict[str, float] | None


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
        ('{"name": "\\ud800", "den": null}', "not valid JSON"),
        ("[]", "Expected `object`, got `array`"),
        ('{"name": "a"}', "missing required field `den`"),
        ('{"name": "a", "den": {"x": "y"}}', r"got `str` - at `\$.den"),
        ('{"name": "a", "den": null, "legs": 4.5}', r"Expected `int`.* at `\$.legs`"),
        ('{"name": "a", "den": null, "legs": true}', r"Expected `int`.* at `\$.legs`"),
    ],
)
def test_json_of_another_kind_is_named(tmp_path, content, reason):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(FileError, match=rf"a\.json' .*{reason}.*; do this$"):
        read_json(tmp_path / "a.json", Fox, fix="do this")


def test_json_that_fits_comes_as_it_is(tmp_path):
    fox = {"name": "a", "den": {"x": 1}, "more": [None, 2**70]}
    write_json(tmp_path / "a.json", fox)
    assert read_json(tmp_path / "a.json", Fox) == fox
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json", Fox)


def test_json_lines_end_where_json_lines_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "\u2028\x85"}\r\n\n{"a": 2}\n{"a"')
    lines = read_json_lines(tmp_path / "a.jsonl")
    assert [next(lines), next(lines)] == [(1, {"a": "\u2028\x85"}), (3, {"a": 2})]
    with pytest.raises(FileError, match="line 4 is not valid JSON"):
        next(lines)


@pytest.fixture
def place(tmp_path):
    """A folder with a file, a pipe and a link to nothing."""
    (tmp_path / "file.png").write_bytes(b"old")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "further")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["new.png", "file.png", "NEW.PNG", "a/b/c/new.png", "./x/../y.png"]
)
def test_an_output_that_can_be_written_is_left_as_it_was(place, name):
    before = sorted(place.rglob("*"))
    outputs.check_output(place / name, (".png",))
    assert sorted(place.rglob("*")) == before and (place / "file.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.jpg", r"has the wrong ending; name the file \*.png"),
        ("x", "has the wrong ending"),
        (".png", "has the wrong ending"),
        ("x.png.txt", "has the wrong ending"),
        ("folder.png", "exists and is no regular file"),
        ("pipe.png", "exists and is no regular file"),
        ("file.png/x.png", "cannot be written"),
        ("file.png/a/b/x.png", "cannot be written"),
        ("nowhere/x.png", "is a link to nothing"),
        ("x" * 249 + ".png", "cannot be written"),  # the file beside it has a longer name
        ("x" * 300 + "/y.png", "cannot be written"),
        ("x\0y.png", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_named(place, name, message):
    before = sorted(place.rglob("*"))
    with pytest.raises(FileError, match=f"(?s)^--grid: .*{message}") as caught:
        outputs.check_output(place / name, (".png",), name="--grid")
    assert "\n" not in str(caught.value) and sorted(place.rglob("*")) == before


@pytest.mark.parametrize("path", ["", "/", "s3://bucket/x.png", "/proc/none/x.png", "/sys/x.png"])
def test_other_places_are_no_outputs(path):
    with pytest.raises(FileError, match="^--output: "):
        outputs.check_output(path)


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    """As root may write anywhere, the system's answer is put in its mouth."""

    def refused(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", refused)
    with pytest.raises(FileError, match=r"cannot be written \(Permission denied at "):
        outputs.check_output(tmp_path / "new" / "x.json")
    assert not any(tmp_path.iterdir())


def test_names_that_no_file_can_have_are_cut_in_the_message(tmp_path):
    with pytest.raises(FileError, match="is longer than a file's name can be") as error:
        read_json(tmp_path / ("a" * 5000))
    assert len(str(error.value)) < 300
