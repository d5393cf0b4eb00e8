"""What a plan says that a step is given is what a run keeps alive, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNTERS = 64  # bytes: of steps and skipped steps


@pytest.mark.slow
def test_live_bytes_are_the_planned_ones_on_eight_devices():
    """In every stage, of full students and of adapters beside a teacher in int8."""
    command = [sys.executable, "benchmarks/live_arrays.py", "--kinds=full,int8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert rows.keys() == {"full", "int8"}
    for kind, stages in rows.items():
        assert stages.keys() == {"time_rescale", "student"}
        for name, stage in stages.items():
            assert 0 <= stage["steps"] - stage["planned"] <= COUNTERS, (kind, name, stage)
