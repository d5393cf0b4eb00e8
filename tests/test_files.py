"""Laws of writing files: whole or not at all."""

import json
import os

import pytest

from jax_distill.files import write_atomically, write_json


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
