"""Configurations, checkpoints, scores and other files of runs that deserve what is said of them."""

import errno
import json
import math
import os
import sys
from pathlib import Path

from absl.testing import flagsaver
from test_disks import of_tensorstore
from test_passing_errors import FAILING
from tiny_runs import RUNS, save_run

from jax_distill import config, main
from jax_distill.evaluation import scoring
from jax_distill.evaluation.report import write_report
from jax_distill.evaluation.results import read_results
from jax_distill.runs import cells, commands, exporting
from jax_distill.storage import files
from jax_distill.training import acceptance, checkpoint, damage


def ask_all(root, ask):
    """As `refused_weights.ask_all`."""
    _configurations(root / "configured", ask)
    _files_of_configurations(root, ask)
    _checkpoints(root, ask)
    _scores(root / "cell", ask)


def _changed(values, key, value):
    section, _, name = key.rpartition(".")
    node = values[section] if section else values
    if value is None:
        del node[name]
    else:
        node[name] = value


def _configurations(workdir, ask):
    config.save(RUNS["flow_matching"], workdir)
    path = workdir / "config.json"
    for key, value in {
        "optimizer.learning_rte": 1.0,
        "batch_size": None,
        "accumulate": "64",
        "optimizer": 3,
        "evaluation.student_steps": [],
        "total_steps": 0,
        "ema_decay": 1.5,
        "seed": 2**32,
        "model.num_layers": 10**8,
        "optimizer.name": "adam",
        "objective.name": "sdm",
        "data.resolution": [512, 100],
        "optimizer.frozen": "(a+)+",
        "name": "../x",
        "optimizer.weight_decay": math.nan,
        "autoencoder.norm_num_groups": 5,
    }.items():
        values = json.loads(config.to_json(RUNS["flow_matching"]))
        _changed(values, key, value)
        path.write_text(json.dumps(values))
        ask(config.load, workdir)
    path.write_text("{")
    ask(config.load, workdir)
    path.unlink()
    ask(config.load, workdir)


FILE = """from jax_distill.config import base
def get_config(preset=""):
    config = base(preset, presets=("", "small"))
    {}
    return config
"""


def _files_of_configurations(root, ask):
    path = root / "x.py"

    def command(*arguments, run=main.main):
        before, sys.argv = sys.argv, ["main", *arguments]
        try:
            with flagsaver.flagsaver():
                commands.run(run)
        finally:
            sys.argv = before

    ask(command, f"--config={path}")
    ask(command, run=lambda argv: files.read_text(Path(FAILING)))
    path.write_text("x = 1\n")
    ask(command, f"--config={path}")
    path.write_text(FILE.format("pass"))
    ask(command, f"--config={path}:huge")
    ask(command, f"--config={path}", "--config.batch_siz=3")
    ask(command, f"--config={path}", "--config.batch_size=many")
    path.write_text(FILE.format("config.batch_siz = 3"))
    ask(command, f"--config={path}")


def _checkpoints(root, ask):
    def tried(error):
        def restore(step):
            raise error

        ask(damage.first_whole, root, [3], restore)

    ask(checkpoint.complete_steps, root)
    (root / "checkpoints").mkdir()
    ask(checkpoint.complete_steps, root)
    tried(damage.Changed("its checksums do not fit what it holds"))
    tried(damage.Other("it has ema.a, which is not asked for"))
    pauses, damage.PAUSES = damage.PAUSES, ()
    try:
        tried(of_tensorstore(errno.EIO))
    finally:
        damage.PAUSES = pauses
    run = save_run(root / "run", RUNS["flow_matching"])
    metadata = next(run.glob("checkpoints/*/progress/metadata"))
    values = json.loads(metadata.read_text())
    values["checksums"]["student.ema"] ^= 1
    metadata.write_text(json.dumps(values))
    ask(exporting.export, str(run), root / "out")


def _scores(cell, ask):
    ask(write_report, cell)
    cell.mkdir()
    path = cell / "results.json"
    measured = '{"measures": {"student": {"2": {"place": "far"}}}}'
    for text in (
        '{"student": {"2": {"score": "high"}}}',
        '{"student": {"two": {}}}',
        measured,
        "{",
    ):
        path.write_text(text)
        ask(read_results, path)
    path.unlink()
    lines = cell / "metrics.jsonl"
    lines.touch()
    os.truncate(lines, 600 << 20)  # zeros, which take no room
    ask(write_report, cell)
    lines.unlink()
    ask(cells.measured, cell)
    (cell / cells.COST).write_text('{"peak_gib": "1"}')
    ask(cells.train, "configs/scm.py", cell, [])
    (cell / acceptance.DATA).write_text('{"records": 3}')
    ask(acceptance.known, cell)
    (cell / scoring.SCORES).write_text('{"x": {}}')
    ask(cells._history, cell / scoring.SCORES)
    (cell / cells.MEASURES).write_text('{"command": "x", "student": {"2": 1}}')
    ask(cells.Beside(None, 50).measured, cell, (2,), {"command": "x"})
