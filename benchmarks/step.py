"""Time and throughput of a training step: sCM's and flow matching's, one JSON line each.

    python benchmarks/step.py [--batch_size=64] [--repeats=7]

Both networks have the bundled teacher's shape. `ratio` is the median time of the step over that of
the reference it names, taken in turn in the same run: flow matching is measured against three
forward passes (its arithmetic), sCM against flow matching (whose arithmetic is 3 to sCM's 5).
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from jax_distill import config as configuration
from jax_distill import worlds
from jax_distill.assembly import build
from jax_distill.flow import Batch
from jax_distill.objectives.objective import STUDENT, View
from jax_distill.planning.flops import count_flops
from jax_distill.training.step import init_state, make_optimizers, make_step

_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Samples a step.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed steps of each.", 1)


def setting(objective: str):
    config = configuration.base()
    config.objective.name = objective
    if objective == "scm":
        config.model.guidance_embeds, config.model.time_scale = True, 1.0
    return config


def prepared(objective: str, batch: Batch):
    """A jitted step with its arguments, and the FLOPs of its gradient and of one forward."""
    config = setting(objective)
    method = build.objective(config, teacher=config)
    optimizers = make_optimizers(method, config)
    params = build.initial_parameters(config)
    state = jax.tree.map(jnp.array, init_state(method, optimizers, params, seed=0))
    frozen = {"null": worlds.of(config).null, "teacher": params}
    step = jax.jit(make_step(method, optimizers, config))
    params = state.players[STUDENT].params
    draws = method.draw(jax.random.key(0), batch)

    def loss(params, frozen):
        return method.loss(params, View(frozen), batch, draws, state.step)[0]

    return lambda: step(state, frozen, batch), count_flops(jax.grad(loss), params, frozen)


def main(argv):
    del argv
    count = _BATCH_SIZE.value
    config = setting("flow_matching")
    shape = (count, *build.token_shape(config))
    text = worlds.of(config).encode(["a red circle above a blue square"] * count)
    batch = Batch(jnp.zeros(shape), jax.tree.map(jnp.asarray, text))
    network, params = build.network(config), build.initial_parameters(config)

    def forward(params):
        return network.velocity(params, batch.x, jnp.full(count, 0.5), batch.text)

    compiled = jax.jit(forward)
    runs = {"forward": lambda: compiled(params)}
    flops = {"forward": count_flops(forward, params)}
    for objective in ("flow_matching", "scm"):
        runs[objective], flops[objective] = prepared(objective, batch)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(_REPEATS.value + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:  # the first compiles
                times[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, reference, factor in (
        ("flow_matching", "forward", 3),
        ("scm", "flow_matching", 1),
    ):
        line = {
            "benchmark": f"{name}_step",
            "ratio": median[name] / (factor * median[reference]),
            "reference": f"{factor} x {reference}" if factor > 1 else reference,
            "step_seconds": median[name],
            "samples_per_sec": count / median[name],
            "flops": flops[name],
            "flops_in_forwards": flops[name] / flops["forward"],
            "batch_size": count,
            "device": jax.devices()[0].device_kind,
        }
        print(json.dumps(line))


if __name__ == "__main__":
    app.run(main)
