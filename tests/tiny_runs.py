"""Small runs of every method, whose networks are random, and the programs of exported cards."""

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_distill import config
from jax_distill.assembly import build
from jax_distill.training import checkpoint

GUIDANCE = 3.0
SIZES = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}


class State(NamedTuple):
    players: dict


def settings(objective: dict, **model: Any) -> ConfigDict:
    result = config.base()
    with result.unlocked():
        result.name = "tiny"
        result.model.update(SIZES | model)
        result.objective = objective
        result.evaluation.guidance = GUIDANCE
    return result


def random_parameters(configuration: ConfigDict, seed: int = 0) -> dict:
    """All weights random, also those that start as zeros."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = 1.0 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
        return jnp.asarray(0.5 * scale * rng.standard_normal(leaf.shape), jnp.float32)

    shapes = jax.eval_shape(lambda: build.initial_parameters(configuration))
    return jax.tree.map(draw, shapes)


def save_run(workdir: Path, configuration: ConfigDict) -> Path:
    config.save(configuration, workdir)
    average = {"network": random_parameters(configuration)}
    state = State({"student": {"ema": average}})
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
    return workdir


STUDENT = {"guidance_embeds": True, "time_scale": 1.0}
PAIR = STUDENT | {"interval_embeds": True}
RUNS = {
    "scm": settings({"name": "scm"}, **STUDENT),
    "meanflow": settings({"name": "meanflow"}, **PAIR),
    "imm": settings({"name": "imm", "time_shift": 0.3}, **PAIR),
    "imm_restart": settings({"name": "imm", "sampler": "restart"}, **PAIR),
    "time_rescale": settings({"name": "time_rescale"}, **STUDENT),
    "flow_matching": settings({"name": "flow_matching", "time_shift": 0.4}),
}


def programs(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def run_program(folder: Path, number: int = 0, name: str = "card") -> dict[str, Any]:
    """Runs a program of the card as it is; returns what it defines."""
    defined = {"__name__": name}
    with contextlib.chdir(folder):
        exec(programs(folder)[number], defined)
    return defined


def assert_same_pictures(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape and actual.dtype == np.uint8
    assert expected.std() > 1  # they show something
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= 1
