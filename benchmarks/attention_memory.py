"""Memory of attention and of the whole FLUX.1-lite sCM step, from the compiler of the device.

    python benchmarks/attention_memory.py [--topology=v5e:1x1] [--implementations=auto,xla]
    python benchmarks/attention_memory.py --step --topology=v5e:8x8 [--tokens=4096] [--effort=-1]
    python benchmarks/attention_memory.py --step --topology=here --layers=1,2 --heads=2

TPUs by name need libtpu (`pip install -e '.[tpu]'`) and no TPU; "here" is what devices this machine
has, where steps are timed as well, implementations in turn. Without --step it compiles one
attention of 24 heads of 128 channels over 4352 tokens, jax.jvp of it and the gradient beside the
stopped tangent; with it, the training step of FLUX.1-lite-8B, one sample a chip, full
rematerialisation, in bfloat16 with float32 parameters, their average, and AdamW's moments sharded
over all chips. One JSON line each; `ratio` is to the temporaries, `time_ratio` to the time, of the
last implementation.
"""

import functools
import json
import math
import os
import statistics
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding

from jax_distill import config as configuration
from jax_distill.devices import sharding
from jax_distill.flow import Batch, Text
from jax_distill.models import mmdit
from jax_distill.objectives.scm import SCM
from jax_distill.objectives.teacher import embedded_guidance
from jax_distill.ops.attention.attention import attention
from jax_distill.planning.flops import count_flops
from jax_distill.training.step import init_state, jit_step, make_optimizers

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:1x1", 'TPU to compile for, or "here".')
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["auto", "xla"], "Of attention.")
_STEP = flags.DEFINE_bool("step", False, "The whole training step in place of one attention.")
_TOKENS = flags.DEFINE_integer("tokens", 4096, "Image tokens of the step; 4096 are 1024 pixels.")
_LAYERS = flags.DEFINE_list("layers", ["8", "38"], "Double and single blocks of the step.")
_HEADS = flags.DEFINE_integer("heads", 24, "Heads of 128 channels of the step.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps of each implementation, here.", 1)
_CHIPS = flags.DEFINE_integer("chips", 0, "Chips of the topology to use; 0 for all.")
_EFFORT = flags.DEFINE_float("effort", 0.0, "Of the compiler; -1 is quick, 0 as for a run.")
TEXT_TOKENS = 256


def devices():
    name = _TOPOLOGY.value
    if name == "here":
        return jax.devices()[: _CHIPS.value or None]
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if name.endswith("1x1") else {}
    found = topologies.get_topology_desc(name, platform="tpu", **bounds).devices
    return found[: _CHIPS.value or None]


def attention_case(implementation: str, device):
    """Value, tangent and gradient beside the stopped tangent of one attention, and arguments."""
    sharding = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((1, 4352, 24, 128), jnp.bfloat16, sharding=sharding)
    function = functools.partial(attention, implementation=implementation)

    def case(query, key, value, d_query, d_key, d_value, cotangent):
        def with_tangent(*primals):
            output, tangent = jax.jvp(function, primals, (d_query, d_key, d_value))
            return output, jax.lax.stop_gradient(tangent)

        (output, tangent), pull = jax.vjp(with_tangent, query, key, value)
        return output, tangent, pull((cotangent, jnp.zeros_like(tangent)))

    return jax.jit(case), (x,) * 7


def step_case(implementation: str, devices):
    """The training step of FLUX.1-lite-8B, and arguments as they lie on the mesh."""
    shape = (1, len(devices), 1)
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh(shape, sharding.AXES, devices=devices, axis_types=axis_types)
    double, single = map(int, _LAYERS.value)
    model = mmdit.MMDiTConfig(
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=_HEADS.value,
        guidance_embeds=True,
        time_scale=1.0,
        remat="full",
        attention=implementation,
    )
    side = int(_TOKENS.value**0.5)
    network = mmdit.as_network(model, dtype=jnp.bfloat16, grid=(side, side))
    objective = SCM(network, embedded_guidance(network))
    config = configuration.base()
    optimizers = make_optimizers(objective, config)
    params = jax.eval_shape(lambda: mmdit.initial_parameters(model, mmdit.nnx.Rngs(0)))
    state = jax.eval_shape(lambda p: init_state(objective, optimizers, p, 0), params)

    def placed(tree):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            tree,
            sharding.shard_state(tree, mesh),
        )

    def split(*dimensions):
        place = NamedSharding(mesh, sharding.BATCH)
        return jax.ShapeDtypeStruct((len(devices), *dimensions), jnp.float32, sharding=place)

    text = Text(split(TEXT_TOKENS, model.joint_attention_dim), split(model.pooled_projection_dim))
    batch = Batch(split(_TOKENS.value, model.in_channels), text)
    state, frozen = placed(state), placed({"teacher": params})
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jit_step(objective, optimizers, config, shardings), (state, frozen, batch)


def timed(compiled: dict, arguments) -> dict[str, float]:
    """Median seconds of a step by implementation, of numbers that are no picture's."""

    def made(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
        some = jax.random.uniform(jax.random.key(math.prod(x.shape)), x.shape, x.dtype, 0, 1 / 64)
        return jax.device_put(some, x.sharding)

    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    state, *rest = jax.tree.map(made, arguments)
    for repeat in range(_REPEATS.value + 1):
        for name, step in compiled.items():
            begun = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, *rest))
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(argv):
    del argv
    found = devices()
    lines, compiled = [], {}
    for implementation in _IMPLEMENTATIONS.value:
        if _STEP.value:
            step, arguments = step_case(implementation, found)
        else:
            step, arguments = attention_case(implementation, found[0])
        line = {
            "benchmark": "flux_scm_step_memory" if _STEP.value else "attention_memory",
            "implementation": implementation,
            "topology": _TOPOLOGY.value,
            "chips": len(found) if _STEP.value else 1,
            "tokens": TEXT_TOKENS + _TOKENS.value if _STEP.value else 4352,
            "flops": count_flops(step, *arguments),
        }
        begun = time.perf_counter()
        try:
            options = {"exec_time_optimization_effort": _EFFORT.value} if _EFFORT.value else {}
            executable = step.lower(*arguments).compile(options)
        except jax.errors.JaxRuntimeError as error:
            line["error"] = next(
                (part for part in str(error).split("\n") if "emory" in part), str(error)[:300]
            )
        else:
            compiled[implementation] = executable
            memory = executable.memory_analysis()
            line["temporary_bytes"] = memory.temp_size_in_bytes
            line["argument_bytes"] = memory.argument_size_in_bytes
            if found[0].platform == "tpu":  # CPUs do not count the temporaries
                line["peak_bytes"] = memory.peak_memory_in_bytes
        line["compile_seconds"] = time.perf_counter() - begun
        lines.append(line)
    if _STEP.value and _TOPOLOGY.value == "here":
        seconds = timed(compiled, arguments)
        for line in lines:
            line["seconds"] = seconds.get(line["implementation"])
    last = lines[-1]
    for line in lines:
        line["reference"] = last["implementation"]
        for name, of in (("ratio", "temporary_bytes"), ("time_ratio", "seconds")):
            if line.get(of) and last.get(of):
                line[name] = line[of] / last[of]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    app.run(main)
