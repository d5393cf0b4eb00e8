"""The notebook runs from top to bottom, and its pictures show something."""

import base64
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import RUNS, save_run

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch/colab.ipynb"
nbformat = pytest.importorskip("nbformat", reason="comes with the extra 'test'")
nbclient = pytest.importorskip("nbclient", reason="comes with the extra 'test'")
pytest.importorskip("ipykernel", reason="comes with the extra 'test'")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    # Its inputs are those of the student: there is no stage before the student's own.
    teacher = save_run(folder / "teacher", RUNS["time_rescale"])
    sizes = {
        "teacher.checkpoint": teacher,
        "batch_size": 4,
        "rescale.batch_size": 4,
        "optimizer.name": "adamw",  # which compiles faster
        "log_every": 1,
        "data.examples": 16,
        "samples.prompts": 2,
        "samples.teacher_steps": 2,
        "evaluation.prompts": 6,
        "evaluation.diversity_prompts": 0,
        "evaluation.student_steps": "2,",
        "evaluation.teacher_steps": "2,",
    }
    environment = {
        "JAX_DISTILL_INSTALL": "no",
        "JAX_DISTILL_STEPS": "2",
        "JAX_DISTILL_RUNS": str(folder / "runs"),
        "JAX_DISTILL_FLAGS": " ".join(f"--config.{key}={value}" for key, value in sizes.items()),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.delenv("JAX_DISTILL_FLUX", raising=False)
        client = nbclient.NotebookClient(
            notebook, timeout=1800, resources={"metadata": {"path": str(ROOT / "launch")}}
        )
        client.execute(env=dict(os.environ))
    keep = os.environ.get("JAX_DISTILL_KEEP_NOTEBOOK")
    if keep:
        nbformat.write(notebook, keep)
    return notebook


def outputs(notebook, source):
    """What the cell with `source` in it has printed, and what it has shown."""
    (cell,) = [
        cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source
    ]
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return text, [output.data for output in cell.outputs if output.output_type == "display_data"]


def picture(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB"))


def test_it_is_committed_without_outputs_and_without_paths_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert not re.search(r"/(work|home|root|tmp|content|Users)/", NOTEBOOK.read_text())


@pytest.mark.slow
def test_it_trains_and_shows_the_grid_and_the_report(executed):
    trained, _ = outputs(executed, 'jax_distill.main", "--config=configs/scm.py')
    assert "step 2/2" in trained and "overall" in trained
    _, (grid,) = outputs(executed, 'glob("*.png"))))')
    assert picture(grid).std() > 10
    _, (report,) = outputs(executed, "report.html")
    page = report["text/html"]
    assert "<iframe srcdoc=" in page and "&lt;table" in page and "image/svg+xml" in page


@pytest.mark.slow
def test_the_student_draws_by_command_and_in_python(executed):
    _, (drawn,) = outputs(executed, "sample = [")
    _, (strip,) = outputs(executed, "jax_distill.load(workdir)")
    drawn, strip = picture(drawn), picture(strip)
    assert drawn.std() > 1 and strip.std() > 1  # they show something
    assert strip.shape[1] == 3 * strip.shape[0]
    first = strip[1::3, 1::3][:, : drawn.shape[1]]  # the strip is three times as large
    assert np.abs(first.astype(int) - drawn.astype(int)).max() <= 1


@pytest.mark.slow
def test_without_weights_flux_is_left_out_in_one_line(executed):
    text, shown = outputs(executed, "if not FLUX:\n    print")
    assert text.startswith("FLUX is left out: ") and text.count("\n") == 1 and shown == []
