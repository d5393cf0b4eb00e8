"""Time of one evaluation of FLUX.1-lite-8B's network, and of its tangent, one JSON line each.

    python benchmarks/network.py [--pixels=512,1024] [--layers=8,38] [--implementations=auto,xla]

The network of the student that is drawn with: all layers, parameters in bfloat16, random. A picture
takes as many evaluations as the sampler has steps, so the time of 1, 2, 4 and 28 follows. The
tangent is `jax.jvp` in the latent and the time, as the objectives take it. Implementations of
attention take turns; `ratio` is the time over that of the last of them, `tflops` counts matrix
products as plain attention has them. Needs 17 GB for the parameters: an accelerator, or fewer
layers and heads.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from jax_distill.flow import Text
from jax_distill.models import mmdit
from jax_distill.planning.flops import count_flops

_PIXELS = flags.DEFINE_list("pixels", ["512", "1024"], "Height and width of the pictures.")
_LAYERS = flags.DEFINE_list("layers", ["8", "38"], "Double and single blocks.")
_HEADS = flags.DEFINE_integer("heads", 24, "Heads of 128 channels.", 1)
_TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 256, "Tokens of a caption.", 1)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1"], "Pictures at once.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["auto", "xla"], "Of attention.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed calls of each.", 1)


def configuration(implementation: str) -> mmdit.MMDiTConfig:
    double, single = map(int, _LAYERS.value)
    return mmdit.MMDiTConfig(
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=_HEADS.value,
        guidance_embeds=True,
        attention=implementation,
    )


def cases(implementation: str) -> dict:
    """The evaluation, and the evaluation with its tangent, of (parameters, x, t, text, moves)."""
    network = mmdit.as_network(configuration(implementation), dtype=jnp.bfloat16)

    def evaluation(params, x, t, text, moves):
        del moves
        return network.velocity(params, x, t, text, jnp.full(t.shape, 3.5))

    def with_tangent(params, x, t, text, moves):
        def at(x, t):
            return network.velocity(params, x, t, text, jnp.full(t.shape, 3.5))

        return jax.jvp(at, (x, t), moves)

    return {"evaluation": evaluation, "with_tangent": with_tangent}


def inputs(pixels: int, count: int) -> tuple:
    model = configuration("auto")
    tokens = (pixels // 16) ** 2
    keys = jax.random.split(jax.random.key(0), 4)
    x, dx = (jax.random.normal(key, (count, tokens, model.in_channels)) for key in keys[:2])
    t = jnp.full(count, 0.6)
    text = Text(
        jax.random.normal(keys[2], (count, _TEXT_TOKENS.value, model.joint_attention_dim)),
        jax.random.normal(keys[3], (count, model.pooled_projection_dim)),
    )
    return x, t, text, (dx, jnp.ones_like(t))


def compare(params, pixels: int, count: int) -> None:
    arguments = (params, *inputs(pixels, count))
    for case in ("evaluation", "with_tangent"):
        programs, seconds, flops = {}, {}, None
        for implementation in _IMPLEMENTATIONS.value:
            function = cases(implementation)[case]
            programs[implementation] = jax.jit(function).lower(*arguments).compile()
            seconds[implementation] = []
            flops = flops or count_flops(function, *arguments)
        for repeat in range(_REPEATS.value + 1):
            for implementation, run in programs.items():
                begun = time.perf_counter()
                jax.block_until_ready(run(*arguments))
                if repeat:  # the first warms up
                    seconds[implementation].append(time.perf_counter() - begun)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for implementation, run in programs.items():
            line = {"benchmark": f"flux_{case}", "implementation": implementation}
            line |= {"pixels": pixels, "pictures": count, "device": jax.devices()[0].device_kind}
            line["seconds"] = medians[implementation]
            line["reference"] = _IMPLEMENTATIONS.value[-1]
            line["ratio"] = medians[implementation] / medians[line["reference"]]
            line["tflops"] = flops / medians[implementation] / 1e12
            line["temporary_bytes"] = run.memory_analysis().temp_size_in_bytes
            print(json.dumps(line), flush=True)


def main(argv):
    del argv
    model = configuration("auto")
    made = jax.jit(lambda: mmdit.initial_parameters(model, nnx.Rngs(0), jnp.bfloat16))
    params = jax.block_until_ready(made())
    count = sum(x.size for x in jax.tree.leaves(params))
    print(json.dumps({"benchmark": "flux_network", "parameters": count}), flush=True)
    for pixels in map(int, _PIXELS.value):
        for pictures in map(int, _BATCH_SIZES.value):
            compare(params, pixels, pictures)


if __name__ == "__main__":
    app.run(main)
