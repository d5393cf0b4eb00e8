"""A training step on eight devices is the step on one, whatever the mesh; see `mesh_steps.py`.

Nearly all of the time is compiling, half a minute of a core for a pair: by default there is one.
All methods run on four meshes with JAX_DISTILL_SLOW_TESTS=1, and -m slow as this one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mesh_steps import gathered_stacks

ROOT = Path(__file__).parents[1]
MESHES = ("2x2x2", "8x1x1", "1x8x1", "1x4x2", "1x4x2+tokens")
METHODS = tuple((name, "adamw") for name in ("scm", "meanflow", "imm", "scm_lora"))
METHODS += (("scm", "muon"),)
# Orthogonalisation makes rounding errors a hundred times larger, and takes matrices whole.
MUON = 2e-4
ALL = "JAX_DISTILL_SLOW_TESTS" in os.environ


@pytest.mark.slow
@pytest.mark.parametrize(("method", "optimizer"), METHODS if ALL else METHODS[:1])
def test_a_step_is_that_of_one_device(method, optimizer):
    """Loss and parameters, in float32; and no device gathers a whole stack of layers."""
    meshes = MESHES if ALL else MESHES[:1]
    done = subprocess.run(
        [sys.executable, "tests/mesh_steps.py", method, optimizer, ",".join(meshes)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    if method != "imm":  # of eight rows, its groups of two lie on two devices each
        assert "nvoluntary full rematerialization" not in done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert list(report) == list(meshes)
    for mesh, found in report.items():
        assert found["loss"] <= 1e-5, (mesh, found)
        assert found["parameters"] <= (MUON if optimizer == "muon" else 1e-5), (mesh, found)
        assert not found["whole"] or optimizer == "muon", (mesh, found)
        assert found["gathers"] or mesh == "8x1x1"  # parts of parameters are, where they are split
        if method == "scm_lora":  # over fsdp all of it, over tensor what is on the kernel's side
            fsdp = int(mesh.split("x")[1])
            assert found["adapters_held"] <= 1 / fsdp, (mesh, found)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("f32[3,32,128]{2,1,0} all-gather(", ["3,32,128"]),
        ("f32[32,128,3]{0,1,2} all-gather(", ["32,128,3"]),
        ("(f32[3,8,128]{2,1,0}, f32[3,32,128]{2,1,0}) all-gather-start(", ["3,32,128"]),
        ("f32[1,32,128]{2,1,0} all-gather(", []),  # of one layer
        ("f32[3,32,128]{2,1,0} all-reduce(", []),
    ],
)
def test_a_gathered_stack_is_found(result, expected):
    program = f"  %x = {result}%param.1), dimensions={{1}}\n  ROOT %y = f32[] add(%x, %x)"
    params = {"kernel": np.zeros((3, 32, 128)), "scale": np.zeros((3, 32))}
    count, whole = gathered_stacks(program, params)
    assert whole == expected and count == ("all-gather" in result)
