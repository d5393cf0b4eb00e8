"""A training step on eight devices is the step on one, whatever the mesh; see `mesh_steps.py`.

Compiling takes most of the time: by default each method runs on one mesh. All twelve pairs run with
JAX_DISTILL_ALL_MESHES=1.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MESHES = ("8x1x1", "1x8x1", "2x2x2", "1x4x2")
CHOSEN = {("scm", "adamw"): "2x2x2", ("meanflow", "adamw"): "1x8x1", ("imm", "muon"): "1x4x2"}
EVERY = "JAX_DISTILL_ALL_MESHES" in os.environ


@pytest.mark.parametrize(("method", "optimizer"), CHOSEN)
def test_a_step_is_that_of_one_device(method, optimizer):
    """Loss and parameters, in float32; and no device ever holds a whole stack of layers."""
    meshes = MESHES if EVERY else [CHOSEN[method, optimizer]]
    done = subprocess.run(
        [sys.executable, "tests/mesh_steps.py", method, optimizer, ",".join(meshes)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert list(report) == list(meshes)
    for mesh, found in report.items():
        assert found["loss"] <= 1e-5 and found["parameters"] <= 1e-5, (mesh, found)
        assert not found["whole"], (mesh, found)
        assert found["gathers"] or mesh == "8x1x1"  # parts of parameters are, where they are split
