"""How much of IMM's gradient bfloat16 leaves, by its `gap`: a table, and one JSON line.

    python benchmarks/imm_gap.py [--steps=60] [--batch_size=64] [--batches=4]

IMM compares what the student makes of x_t and of x_r. The larger the gap k, the nearer the two are,
and the less of their difference is left when the network computes in bfloat16. Here its gradient is
computed in both types, by the trained parameters, at the same parameters, batches and draws, with
the bundled teacher; the student has been trained in float32 for some steps of configs/imm.py.
`cosine` is that of the two gradients, `norm` the ratio of their lengths, means over the batches.
`ratio` is the cosine at the gap of configs/imm.py:flux_lite, 1 that of float32 with itself.
"""

import dataclasses
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jax_distill.assembly import build, stages
from jax_distill.assembly.frozen import narrowed
from jax_distill.data.loader import batches, example_of_row
from jax_distill.objectives.objective import STUDENT, View
from jax_distill.runs import experiment
from jax_distill.training.optimizer import trained
from jax_distill.training.step import combine, init_state, make_optimizers, make_step, partition

_STEPS = flags.DEFINE_integer("steps", 60, "Steps of training before.", 0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Rows of a batch.", 4)
_BATCHES = flags.DEFINE_integer("batches", 4, "Batches that are measured.", 1)

CONFIG = Path(__file__).parents[1] / "configs" / "imm.py"
GAPS = range(4, 13)


def configuration(preset: str = ""):
    spec = importlib.util.spec_from_file_location("imm_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset)


def objective(config, teacher, dtype: str):
    """IMM with student and teacher computing in a type."""
    config, teacher = (c.copy_and_resolve_references() for c in (config, teacher))
    with config.unlocked(), teacher.unlocked():
        config.dtype = teacher.dtype = dtype
    return build.objective(config, teacher)


def gradient(method, config):
    """(params, frozen, batch, draws) -> the gradient by the trained parameters, as one vector."""

    def compute(params, frozen, batch, draws):
        chosen, others = partition(params, trained(config.optimizer, params))

        def loss(chosen):
            return method.loss(combine(chosen, others), View(frozen), batch, draws, 0)[0]

        leaves = jax.tree.leaves(jax.grad(loss)(chosen))
        return jnp.concatenate([leaf.ravel() for leaf in leaves])

    return jax.jit(compute)


def compare(full: jax.Array, short: jax.Array) -> dict[str, float]:
    lengths = jnp.linalg.norm(full), jnp.linalg.norm(short)
    cosine = full @ short / (lengths[0] * lengths[1])
    return {"cosine": float(cosine), "norm": float(lengths[1] / lengths[0])}


def main(argv):
    del argv
    config = configuration().copy_and_resolve_references().unlock()
    config.batch_size = _BATCH_SIZE.value
    config.data.examples = max(2048, _BATCH_SIZE.value)
    (config, _, (stage, *_)), teacher = experiment.with_teacher(config)
    initial = stages.initial_network(stage, teacher.params["network"])
    # The values that a run in bfloat16 has of its teacher, in both types.
    frozen = {
        "teacher": narrowed(teacher.params["network"], "bfloat16"),
        "null": teacher.world.null,
    }
    method = objective(config, teacher.config, "float32")
    gradients = [
        gradient(objective(config, teacher.config, dtype), config)
        for dtype in ("float32", "bfloat16")
    ]
    optimizers = make_optimizers(method, config)
    state = jax.tree.map(jnp.array, init_state(method, optimizers, initial, config.seed))
    step = jax.jit(make_step(method, optimizers, config), donate_argnums=0)
    with tempfile.TemporaryDirectory() as folder:
        source = teacher.world.source(Path(folder))
        layout = example_of_row(config.batch_size, 1, method.rows_per_example)
        stream = batches(source, config.batch_size, config.seed, layout=layout)
        data = [next(stream) for _ in range(_BATCHES.value)]
        for _ in range(_STEPS.value):
            state, _ = step(state, frozen, next(stream))
    table = {}
    for gap in GAPS:
        drawn = dataclasses.replace(method, gap=gap).draw  # the loss knows r alone
        found = []
        for number, batch in enumerate(data):
            draws = drawn(jax.random.key(number), batch)
            found.append(
                compare(
                    *(g(state.players[STUDENT].params, frozen, batch, draws) for g in gradients)
                )
            )
        table[gap] = {key: round(float(np.mean([f[key] for f in found])), 3) for key in found[0]}
        print(f"gap {gap:2}: {table[gap]}", file=sys.stderr, flush=True)
    chosen = configuration("flux_lite").objective.gap
    line = {
        "benchmark": "imm_gap",
        "ratio": table[chosen]["cosine"],
        "reference": "the gradient in float32",
        "gap": chosen,
        "gaps": table,
        "steps": _STEPS.value,
        "batch_size": config.batch_size,
        "batches": len(data),
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    app.run(main)
