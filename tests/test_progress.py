"""What a run tells of itself."""

import json
import math
import re
from types import SimpleNamespace

import pytest
from absl import logging

from jax_distill.training import progress
from jax_distill.training.progress import Report

RATES = {"learning_rate": 0.1}


@pytest.fixture
def told(monkeypatch):
    """The lines for the terminal."""
    lines = []

    def info(text, *values):
        if text.startswith("step"):  # TensorBoard's writer logs too
            lines.append(text % values)

    monkeypatch.setattr(logging, "info", info)
    return lines


def metrics(loss, skipped=0):
    return {"loss": loss, "gradient_norm": 2 * loss, "skipped": skipped}


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_means_since_the_line_before(tmp_path, told):
    with Report(tmp_path, total=4, batch_size=8) as report:
        report.begin(0, {})
        for step, loss in enumerate([1.0, 2.0, 5.0, 9.0], start=1):
            report.add(metrics(loss))
            if step % 2 == 0:
                report.write(step, RATES)
    lines = read(tmp_path)
    assert [(line["step"], line["loss"], line["gradient_norm"]) for line in lines] == [
        (2, 1.5, 3.0),
        (4, 7.0, 14.0),
    ]
    assert list(lines[0])[:2] == ["step", "loss"] and lines[0]["learning_rate"] == 0.1
    assert lines[0]["examples_per_sec"] == pytest.approx(8 * lines[0]["steps_per_sec"])
    assert re.fullmatch(r"step 2/4  loss 1\.5000  [\d.]+ examples/s  \d+:\d\d left", told[0])
    assert told[1].endswith("0:00 left")
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_values_that_are_not_finite_are_left_out_of_means(tmp_path, told):
    with Report(tmp_path, total=4, batch_size=8) as report:
        report.begin(0, {})
        report.add(metrics(1.0))
        report.add(metrics(math.nan, skipped=1))
        report.write(2, RATES)
        report.add(metrics(math.inf, skipped=2))
        report.write(3, RATES)
    first, second = read(tmp_path)
    assert (first["loss"], first["skipped"]) == (1.0, 1)
    assert (second["loss"], second["skipped"]) == (None, 2)
    assert "loss not finite" in told[1]


def test_a_report_goes_on_within_a_line(tmp_path):
    with Report(tmp_path / "whole", total=4, batch_size=8) as whole:
        (tmp_path / "whole").mkdir()
        whole.begin(0, {})
        for loss in (0.1, 0.2, 0.7):
            whole.add(metrics(loss))
        whole.write(3, RATES)
    (tmp_path / "parts").mkdir()
    first = Report(tmp_path / "parts", total=4, batch_size=8)
    first.add(metrics(0.1))
    window = json.loads(json.dumps(first.window))  # through a checkpoint
    with Report(tmp_path / "parts", total=4, batch_size=8) as second:
        second.begin(1, window)
        second.add(metrics(0.2))
        second.add(metrics(0.7))
        second.write(3, RATES)
    clock = ("time", "steps_per_sec", "examples_per_sec")
    (a,), (b,) = (read(tmp_path / name) for name in ("whole", "parts"))
    assert {k: v for k, v in a.items() if k not in clock} == {
        k: v for k, v in b.items() if k not in clock
    }


def test_lines_of_steps_that_will_be_taken_again_are_dropped(tmp_path):
    whole = '{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 0.9}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_text(whole + '{"step": 6, "loss": 0.8}\n{"step": 8, "lo')
    with Report(tmp_path, total=9, batch_size=8) as report:
        report.begin(5, {})
    assert path.read_text() == whole


def test_the_clock_leaves_out_the_steps_before_a_turn_is_compiled(tmp_path, monkeypatch):
    """A program that is compiled late makes no step before it faster."""
    now = iter(range(0, 1000, 10))
    clock = SimpleNamespace(monotonic=lambda: next(now))
    monkeypatch.setattr(progress, "time", clock)
    with Report(tmp_path, 100, 1) as report:
        report.begin(0, {})
        report.start_clock(0)
        report.start_clock(49)  # at the fiftieth step
        report.write(50, {})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["steps_per_sec"] == 1 / 10


def test_a_report_that_never_began_writes_nothing(tmp_path):
    with Report(tmp_path, total=4, batch_size=8):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0:00"), (59.6, "1:00"), (151, "2:31"), (36123, "10:02:03")]
)
def test_time_left(seconds, expected):
    assert progress.clock(seconds) == expected


def test_lines_of_later_steps_and_what_is_no_line_are_left_out(tmp_path):
    lines = ['{"step": 2, "loss": 1.0}', "3", '{"loss": 1}', '{"step": "4"}', "[]", '{"step": 9}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4}', '{"step": 4, "lo']))
    with Report(tmp_path, total=9, batch_size=8) as report:
        report.begin(5, {})
    assert read(tmp_path) == [{"step": 2, "loss": 1.0}, {"step": 4}]


@pytest.mark.parametrize("tail", [b"\0" * 5000, b'{"step": 3, "loss": "\xff', b"\xff\xfe\0\n"])
def test_bytes_that_are_no_text_spoil_their_line_alone(tmp_path, tail):
    path = tmp_path / progress.METRICS
    lines = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    path.write_bytes(lines + tail)
    progress._forget_after(path, 9)
    assert path.read_bytes() == lines
    progress._forget_after(path, 1)
    assert path.read_bytes() == lines.splitlines(keepends=True)[0]
