"""A method is one file among the objectives and one config: every command then knows it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD = '''
"""Velocity matching along straight steps, a method of a test."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Network, interpolate, straight_step
from jax_distill.objectives.objective import Method
from jax_distill.objectives.settings import positive, scales
from jax_distill.objectives.teacher import TeacherVelocity
from jax_distill.sampling import PushForward, Shifted


class ToyDraws(NamedTuple):
    t: jax.Array
    noise: jax.Array
    guidance: jax.Array


@dataclasses.dataclass(frozen=True)
class Toy(Method):
    name = "toy"
    summary = "A student by a toy method"
    card_steps = 3

    network: Network
    teacher: TeacherVelocity
    guidance_scales: tuple[float, ...] = scales(2.0, 3.0)
    factor: float = positive(1.0)

    @property
    def sampled_by(self):
        return PushForward(Shifted(0.5))

    def draw(self, key, batch):
        key_t, key_noise, key_guidance = jax.random.split(key, 3)
        count = batch.x.shape[:1]
        scales = jnp.asarray(self.guidance_scales, jnp.float32)
        return ToyDraws(
            jax.random.uniform(key_t, count),
            jax.random.normal(key_noise, batch.x.shape),
            jax.random.choice(key_guidance, scales, count),
        )

    def loss(self, params, view, batch, draws, moves):
        x_t = interpolate(batch.x, draws.noise, draws.t)
        inputs = x_t, draws.t, batch.text, draws.guidance
        wanted = jax.lax.stop_gradient(self.teacher(view.frozen, *inputs))
        error = self.network.velocity(params["network"], *inputs) - wanted
        return self.factor * jnp.mean(jnp.square(error)), {}

    def motion(self, params, null=None):
        def jump(x, t, s, text, guidance):
            velocity = self.network.velocity(params["network"], x, t, text, guidance)
            return straight_step(x, t, s, velocity)

        return jump
'''
CONFIG = '''
"""The toy method, on the bundled teacher."""

from jax_distill.assembly.build import objective_settings
from jax_distill.config import shorten, student


def get_config(preset=""):
    config = student(preset)
    config.name = "toy"
    config.objective = objective_settings("toy", factor=0.5)
    shorten(config)
    config.total_steps, config.rescale.total_steps = 2, 0
    config.evaluation.prompts, config.evaluation.teacher_steps = 6, (2,)
    return config.lock()
'''


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The project with the two files of the method, and nothing else that is new."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("jax_distill", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "jax_distill/objectives/toy.py").write_text(METHOD)
    (folder / "configs/toy.py").write_text(CONFIG)
    return folder


def run(tree, command, *flags):
    done = subprocess.run(
        [sys.executable, "-m", f"jax_distill.{command}", *flags],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


def succeed(*arguments):
    code, out, errors = run(*arguments)
    assert code == 0, errors
    return out


@pytest.mark.slow
def test_a_method_is_one_file_and_one_config(tree):
    at = "--checkpoint=runs/toy"
    succeed(tree, "main", "--config=configs/toy.py")
    lines = (tree / "runs/toy/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
    results = json.loads((tree / "runs/toy/results.json").read_text())
    assert set(results["student"]) == {"1", "2", "4"} and results["config"]["objective"] == {
        "name": "toy",
        "guidance_scales": [2.0, 3.0],
        "factor": 0.5,
    }
    assert (tree / "runs/toy/checkpoints/2").is_dir()
    assert "nothing to do" in run(tree, "main", "--config=configs/toy.py")[2]
    succeed(tree, "sample", at, "--prompt=a red circle", "--steps=2", "--output=out.png")
    assert (tree / "out.png").read_bytes()[:4] == b"\x89PNG"
    succeed(tree, "evaluate", at, "--steps=1", "--prompts=6", "--output=scores.json")
    assert "1" in json.loads((tree / "scores.json").read_text())["student"]
    plan = succeed(tree, "plan", "--config=configs/toy.py", "--topology=gpu:h200x8")
    assert "toy on gpu:h200x8" in plan
    succeed(tree, "export", at, "--format=safetensors", "--output=out")
    card = (tree / "out/README.md").read_text()
    assert "A student by a toy method" in card and "- steps: 3" in card
    assert "mu = 0.5" in card


def test_its_settings_are_checked_by_what_stands_beside_them(tree):
    for setting, words in (
        ("factor=-1", "objective.factor: -1.0 is not positive"),
        ("factr=2", "objective.factr: there is no key 'factr'; did you mean 'factor'?"),
    ):
        code, _, errors = run(
            tree, "main", "--config=configs/toy.py", f"--config.objective.{setting}"
        )
        assert code == 1 and words in errors
