"""One training step on meshes of eight virtual devices beside the step on one.

`python tests/mesh_steps.py scm adamw 8x1x1,2x2x2` prints a JSON object of each mesh: how far the
loss, the gradient's norm and the parameters are from those of one device, relatively, which of the
collectives gather a stack of layers, and the share of the state of adapters that a device holds. A
mesh such as `1x4x2+tokens` splits tokens over `tensor`; `scm_lora` trains adapters.
"""

import json
import math
import os
import re
import sys

if __name__ == "__main__":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from tiny_runs import PAIR, STUDENT, random_parameters, settings

from jax_distill.assembly import build
from jax_distill.devices import sharding
from jax_distill.flow import Batch
from jax_distill.models import lora
from jax_distill.training.step import init_state, jit_step, make_optimizers

LAYERS = 3  # a size that nothing else has
SIZES = {
    "num_single_layers": LAYERS,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "axes_dims_rope": (2, 2, 4),
}
METHODS = {
    "scm": ({"name": "scm"}, STUDENT),
    "meanflow": ({"name": "meanflow"}, PAIR),
    "imm": ({"name": "imm", "particles": 2}, PAIR),
    "scm_lora": ({"name": "scm"}, STUDENT),
}
RANK = 2  # of adapters
ROWS = 8
GATHER = re.compile(r"= (\(?[^=]*?) all-gather(?:-start)?\(")


def prepare(method: str, optimizer: str):
    """(configuration, objective, optimizers, student's parameters, frozen, batch)."""
    objective, model = METHODS[method]
    config = settings(objective, **SIZES, **model)
    teacher = settings({"name": "time_rescale"}, **SIZES, **STUDENT)
    with config.unlocked():
        config.batch_size, config.optimizer.name = ROWS, optimizer
        config.total_steps = 10
        # Adam's first step is the gradient's sign, where that is no more than rounding too.
        config.optimizer.epsilon = 1e-4
        config.lora.rank = RANK if method.endswith("_lora") else 0
    rng = np.random.default_rng(0)
    text = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
        build.text_like(config, ROWS),
    )
    x = rng.standard_normal((ROWS, *build.token_shape(config))).astype(np.float32)
    frozen = {"teacher": random_parameters(teacher, 1), "null": jax.tree.map(lambda t: t[:1], text)}
    objective = build.objective(config, teacher)
    return (
        config,
        objective,
        make_optimizers(objective, config),
        student(config),
        frozen,
        Batch(x, text),
    )


def student(config) -> dict:
    """Random parameters, those of adapters too: none of them starts as zeros."""
    params = random_parameters(config)
    if not config.lora.rank:
        return params
    adapters = lora.LoRA(RANK, config.lora.alpha, config.lora.targets)
    state = adapters.split(jax.random.key(0), params)
    state = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), state
    )
    return adapters.attach(params, state)


def held_share(state) -> float:
    """The share of the adapters, their averages and moments that lies on the first device."""
    whole = held = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        if "lora_" in jax.tree_util.keystr(path):
            whole += leaf.size
            held += leaf.addressable_shards[0].data.size
    return held / max(whole, 1)


def take(sizes, split_tokens, config, objective, optimizers, params, frozen, batch):
    """Parameters and metrics after a step on a mesh, the program, and `held_share` of the state."""
    devices = jax.devices()[: math.prod(sizes)]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), devices)
    state = init_state(objective, optimizers, params, 0)
    places = sharding.shard_state(state, mesh)
    state = jax.tree.map(jnp.copy, jax.device_put(state, places))  # the step takes it
    frozen = sharding.put(frozen, sharding.shard_state(frozen, mesh))
    batch = sharding.shard_batch(batch, mesh)
    with config.unlocked():
        config.mesh.split_tokens = split_tokens
    step = jit_step(objective, optimizers, config, places)
    program = step.lower(state, frozen, batch).compile({"xla_backend_optimization_level": 0})
    state, metrics = program(state, frozen, batch)
    share = held_share(state)
    state, metrics = jax.device_get((state, metrics))
    return state.players["student"].params, metrics, program.as_text(), share


def gathered_stacks(program: str, params: dict) -> tuple[int, list[str]]:
    """How many all-gathers a compiled program has, and which of them make a whole stack."""
    stacks = {tuple(sorted(p.shape)) for p in jax.tree.leaves(params) if p.ndim == 3}
    stacks = {shape for shape in stacks if shape[0] > 1}  # one layer is gathered to be used
    found = GATHER.findall(program)
    shapes = [shape for result in found for shape in re.findall(r"\[([\d,]+)\]", result)]
    whole = [s for s in shapes if tuple(sorted(map(int, s.split(",")))) in stacks]
    return len(found), whole


def main(method: str, optimizer: str, meshes: str) -> None:
    prepared = prepare(method, optimizer)
    expected, reference, *_ = take((1, 1, 1), False, *prepared)
    report = {}
    for name in meshes.split(","):
        sizes, _, tokens = name.partition("+")
        sizes = tuple(map(int, sizes.split("x")))
        found, metrics, program, share = take(sizes, bool(tokens), *prepared)
        gathers, whole = gathered_stacks(program, expected)
        leaves = zip(jax.tree.leaves(expected), jax.tree.leaves(found))
        report[name] = {
            "loss": abs(float(metrics["loss"] / reference["loss"]) - 1),
            "parameters": max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in leaves),
            "gradient_norm": abs(float(metrics["gradient_norm"] / reference["gradient_norm"]) - 1),
            "gathers": gathers,
            "whole": whole,
            "adapters_held": share,
        }
        print(name, report[name], file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
