"""The smoke preset of each config of two players: trained, scored, drawn with and scored again."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METRICS = {  # of each method's own, beside the losses
    "dmd2": "student/score_difference",
    "rcm": "student/dmd",
    "tdm": "student/gradient_norm",
    "sid": "student/gradient_norm",
    "ladd": "heads/real",
    "sprint": "student/consistency",
}
DRAWN = ("dmd2", "tdm")
"""Methods whose students are drawn with and scored again: one a sampler."""


def succeed(command, *flags):
    done = subprocess.run(
        [sys.executable, "-m", f"jax_distill.{command}", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_a_smoke_run_goes_through_every_stage(name, tmp_path):
    workdir, at = tmp_path / "run", f"--checkpoint={tmp_path}/run"
    succeed("main", f"--workdir={workdir}", f"--config=configs/{name}.py:smoke")
    results = json.loads((workdir / "results.json").read_text())
    assert set(results["student"]) == {"1", "2", "4"}
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = {key: value for line in lines for key, value in json.loads(line).items()}
    losses = [value for key, value in found.items() if key.endswith("/loss")]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert math.isfinite(found[METRICS[name]])
    if name not in DRAWN:
        return
    succeed("sample", at, "--prompt=a red circle", "--steps=2", f"--output={tmp_path}/x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    succeed("evaluate", at, "--steps=1", "--prompts=6", f"--output={tmp_path}/scores.json")
    assert "1" in json.loads((tmp_path / "scores.json").read_text())["student"]
