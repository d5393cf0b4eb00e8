"""The prepare command: what it refuses, and that a teacher draws what captions ask for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver
from test_pipeline import tiny_pipeline
from test_sources import CAPTIONS, KINDS

from jax_distill import pipeline, prepare
from jax_distill.config import base
from jax_distill.data.records import LatentRecords
from jax_distill.data.sources.source import Columns
from jax_distill.runs import commands
from jax_distill.worlds.shapes.sources import RenderedPictures

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command into `output`; returns its error, None if there is none."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["prepare", f"--output={tmp_path / 'output'}", *flags])
        with flagsaver.flagsaver():
            try:
                commands.run(prepare.main)
            except SystemExit as stop:
                return stop.code or None

    return run


def test_a_teacher_draws_for_captions_without_a_picture(run, monkeypatch, tmp_path):
    teacher = tiny_pipeline("flow_matching")
    monkeypatch.setattr(pipeline, "load", lambda source, mesh: teacher)
    monkeypatch.setattr(prepare, "weights_of", lambda source: "0")
    monkeypatch.setattr("jax_distill.data.drawing.DRAWN_BATCH", 4)
    captions = ["a red circle", "two squares", "a red circle", "a green cross", "three disks"]
    (tmp_path / "captions.txt").write_text("\n".join(["", *captions, ""]))
    flags = ["--teacher=it", f"--captions={tmp_path / 'captions.txt'}", "--steps=2"]
    assert run(*flags) is None
    records = LatentRecords(tmp_path / "output")
    assert [records[index].caption for index in range(len(records))] == captions
    assert [records[index].key for index in (0, 4)] == ["captions.txt:2", "captions.txt:6"]
    assert records.description["distinct_captions"] == 4
    latents = np.stack([records[index].latents for index in range(5)])
    assert latents.shape == (5, 16, 64) and np.isfinite(latents).all()
    assert np.abs(latents[0] - latents[2]).max() > 0.1  # the same caption, another noise
    assert "already prepared" in run(*flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--captions=c.txt"], "--captions needs --teacher"),
        (["--steps=4"], "--steps needs --teacher"),
        (["--teacher=x", "--latents=sample"], "--latents needs --source"),
        (["--height=128"], "--height needs --source or --teacher"),
        (["--embed=false"], "--embed needs --source or --teacher"),
        (["--teacher=embedded", "--source=x", "--checkpoint=y"], "give one of them"),
        (["--teacher=embedded", "--captions=no.txt"], "'no.txt' is missing"),
        (["--teacher=no/where"], "'no/where' is no workdir of a run"),
        (["--source=x"], "--checkpoint and --source go together"),
        (["--damaged=skip"], "--damaged needs --source"),
        (["--image_column=x"], "--image_column needs --source"),
        (["--caption_column=x"], "--caption_column needs --source or --captions"),
        (["--source=x", "--checkpoint=y", "--damaged_share=0.1"], "needs --damaged=skip"),
        (["--padding=kept"], "--padding needs --source or --teacher"),
        (["--check=no/where"], "'no/where' has no dataset.json"),
        (["--sizes=16x16"], "--sizes needs --source"),
        (["--source=x", "--checkpoint=y", "--sizes=16x16", "--height=16"], "--height is for pic"),
        (["--source=x", "--checkpoint=y", "--sizes=16x16", "--dry_run"], "--dry_run is for pic"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(run, tmp_path, flags, expected):
    error = run(*flags)
    assert expected in error and "\n" not in error and not (tmp_path / "output").exists()


def test_flags_choose_the_source_its_columns_and_what_may_be_left_out(
    run, monkeypatch, tmp_path, capfd
):
    asked = []

    class World:
        def work(self, source, *, seed, damaged_share, padding, embed):
            asked.append((source[0].caption, len(source), seed, damaged_share, padding, embed))
            return RenderedPictures(len(source), 0, lambda images: images[:, :1, 0, :1], (1, 1))

    config = base()
    monkeypatch.setattr(prepare, "ported_config", lambda folder: config)
    monkeypatch.setattr(prepare.worlds, "of", lambda config: World())
    names, columns = KINDS["parquet"](tmp_path)
    one, other = (f"--source={tmp_path / name}" for name in ("a.parquet", "b.parquet"))
    flags = [f"--image_column={columns.image}", f"--caption_column={columns.caption}"]
    assert run("--checkpoint=y", one, other, *flags) is None
    assert run(f"--check={tmp_path / 'output'}") is None
    dry = ["--damaged=skip", "--padding=kept", "--dry_run"]
    assert run("--checkpoint=y", other, *flags, *dry) is None  # though a folder is there
    shutil.rmtree(tmp_path / "output")
    assert "examples: 2\ndistinct captions: 2\n" in capfd.readouterr().out
    assert run("--checkpoint=y", other, *flags, "--embed=false", "--dry_run") is None
    more = ["--damaged=skip", "--damaged_share=0.2", "--latents=sample", "--seed=3"]
    assert run("--checkpoint=y", f"--source={names[0]}", *flags, *more) is None
    shutil.rmtree(tmp_path / "output")
    assert "no column 'image'" in run("--checkpoint=y", one)
    assert asked == [
        (CAPTIONS[0], 5, None, 0.0, "shared", True),
        (CAPTIONS[3], 2, None, 0.01, "kept", True),
        (CAPTIONS[3], 2, None, 0.0, "shared", False),
        (CAPTIONS[0], 5, 3, 0.2, "shared", True),
    ]


def test_captions_are_a_column_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        'n,words\r\n1,"a fox,\r\nred"\r\n2,f\xe9e\r\n'.encode("utf-16")
    )
    found = prepare.read_captions(tmp_path / "a.csv", Columns(caption="words"))
    assert found == (["a.csv:2", "a.csv:4"], ["a fox,\nred", "f\xe9e"])
    (tmp_path / "a.jsonl").write_text('{"caption": "a fox", "n": 1}\n\n{"caption": "two"}\n')
    assert prepare.read_captions(tmp_path / "a.jsonl")[1] == ["a fox", "two"]
    with pytest.raises(ValueError, match="a.jsonl', line 1 does not hold .* field `words`.*column"):
        prepare.read_captions(tmp_path / "a.jsonl", Columns(caption="words"))


def test_captions_are_lines_of_text(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeff a f\xe9e \r\n\r\n  \nsnow\u2028 and\x0c ice\x85".encode())
    assert prepare.read_captions(path)[1] == ["a f\xe9e", "snow\u2028 and\x0c ice"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n\n", "has no caption"),
        ("a f\xe9e".encode("latin-1"), "is not UTF-8 text"),
        (b"a fox\na\0b", "NUL"),
        (b"a fox\ra hen\ra cow", "line 1: the caption has CR inside"),
        (b"\n" + b"x" * 70_000, "line 2: the caption has 70000 characters"),
    ],
)
def test_captions_that_are_none_are_refused(tmp_path, content, message):
    path = tmp_path / "captions.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare.read_captions(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is no regular file"):
        prepare.read_captions(path)


@pytest.mark.slow
def test_killed_and_on_several_processes_the_same_files_are_made():
    command = [sys.executable, "benchmarks/prepare_kill.py", "--kills=2", "--processes=2"]
    command += ["--examples=500", "--seed=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["ratio"] == 1 and line["files"] > 8 and line["kills"] >= 2 and not line["left"]
