"""Laws of metrics.jsonl: every whole line counts once, no broken one does harm."""

import json
import math
import os

import numpy as np
import pytest

from jax_distill.evaluation import metrics
from jax_distill.evaluation.metrics import read_metrics
from jax_distill.storage.files import FileError


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_broken_lines_are_skipped_and_counted(tmp_path):
    good = [{"step": step, "loss": 1.0 / step} for step in (10, 20, 30)]
    broken = ["{", "[1]", "3", '{"loss": 1.0}', '{"step": NaN}', '{"step": "1"}']
    whole = read_metrics(write(tmp_path / "whole.jsonl", *good))
    torn = read_metrics(write(tmp_path / "torn.jsonl", good[0], *broken, "", *good[1:], '{"st'))
    assert torn.lines == whole.lines and (whole.unreadable, torn.unreadable) == (0, 7)
    steps, loss = torn.series("loss")
    np.testing.assert_array_equal(steps, [10, 20, 30])
    np.testing.assert_array_equal(loss, [1 / 10, 1 / 20, 1 / 30])


def test_bytes_that_are_no_text_spoil_only_their_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n\xff\xfe\x00\n{"step": 2, "loss": 1}\n')
    metrics = read_metrics(path)
    assert metrics.last_step == 2 and metrics.unreadable == 1


def test_steps_taken_again_replace_the_first_ones(tmp_path):
    lines = [{"step": 1, "loss": 9}, {"step": 2, "loss": 9}, {"step": 1, "loss": 1}]
    metrics = read_metrics(write(tmp_path / "m.jsonl", *lines))
    assert [line["loss"] for line in metrics.lines] == [1, 9]


def test_only_finite_numbers_are_drawn(tmp_path):
    lines = [
        {"step": 1, "loss": math.nan, "mode": "x", "flag": True, "late": None},
        {"step": 2, "loss": 1, "late": 3},
        {"step": 3, "loss": math.inf},
    ]
    metrics = read_metrics(write(tmp_path / "m.jsonl", *lines))
    assert metrics.names() == ["step", "loss", "late"]
    np.testing.assert_array_equal(metrics.series("loss"), [[2], [1]])
    np.testing.assert_array_equal(metrics.series("late"), [[2], [3]])
    assert metrics.series("unknown")[0].shape == (0,)


def test_time_adds_over_the_processes_of_a_resumed_run(tmp_path):
    times = [5, 9, 12, 4, 7, 2]  # three processes: 12 s, 7 s, 2 s
    lines = [{"step": step, "time": time} for step, time in enumerate(times)]
    assert read_metrics(write(tmp_path / "m.jsonl", *lines)).seconds == 21


def test_no_lines_are_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "missing.jsonl") is None
    assert read_metrics(write(tmp_path / "empty.jsonl")) is None


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n')
    assert read_metrics(path) is not None
    os.truncate(path, metrics.MOST_BYTES + 1)
    with pytest.raises(FileError, match="MiB, more than the 512 MiB that"):
        read_metrics(path)
