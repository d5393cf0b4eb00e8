"""Time, memory and error of attention with its derivatives, one JSON line each.

    python benchmarks/attention.py [--tokens=1280,4352] [--heads=24] [--dtype=bfloat16]
    python benchmarks/attention.py --accuracy
    python benchmarks/attention.py --tune

By default: the time of the forward pass, of it with its tangent, and of both with the gradient
beside the stopped tangent (the training step), of what "auto" chooses here, against plain XLA and,
on NVIDIA GPUs, against cuDNN's attention, whose forward and backward pass without any tangent are
the floor. Every measurement is a process of its own, so that its peak memory is its own, and
implementations take turns; what cannot be measured here is reported as skipped. `ratio` is ours
over the reference that the line names.

--accuracy compares every implementation with float64, in the Euclidean norm. --tune times block
sizes and prints rows for `jax_distill/ops/attention/block_sizes.py`; on CPUs it interprets the
kernels, which shows only that they run.
"""

import functools
import json
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jax_distill.ops.attention import flash_jvp_gpu, flash_jvp_tpu, lowering
from jax_distill.ops.attention.attention import attention, plain
from jax_distill.ops.attention.block_sizes import KERNELS, Blocks, block_sizes

CASES = ("forward", "forward_tangent", "step")
ACCURACY = [  # queries, keys, width
    (1280, 1280, 128),
    (4352, 4352, 128),
    (1077, 1077, 128),
    (1280, 1280, 64),
    (1077, 1077, 64),
    (130, 700, 64),
]

_TOKENS = flags.DEFINE_list("tokens", ["1280", "4352"], "Queries and keys.")
_HEADS = flags.DEFINE_integer("heads", 24, "Heads.", 1)
_WIDTH = flags.DEFINE_integer("width", 128, "Channels of a head.", 1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the inputs.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each process.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes of each measurement.", 1)
_ACCURACY = flags.DEFINE_bool("accuracy", False, "Errors against float64.")
_TUNE = flags.DEFINE_bool("tune", False, "Time block sizes.")
_ONE = flags.DEFINE_list("one", [], "Measure one implementation, case and tokens, here and now.")


def case_of(name: str, function):
    """(q, k, v, dq, dk, dv, cotangent) -> what the case computes."""

    def forward(q, k, v, *_):
        return function(q, k, v)

    def forward_tangent(q, k, v, dq, dk, dv, _):
        return jax.jvp(function, (q, k, v), (dq, dk, dv))

    def step(q, k, v, dq, dk, dv, cotangent):
        def with_tangent(*primals):
            output, tangent = jax.jvp(function, primals, (dq, dk, dv))
            return output, jax.lax.stop_gradient(tangent)

        (output, tangent), pull = jax.vjp(with_tangent, q, k, v)
        return output, tangent, pull((cotangent, jnp.zeros_like(tangent)))

    return {"forward": forward, "forward_tangent": forward_tangent, "step": step}[name]


def cudnn(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def cudnn_case(name: str):
    """cuDNN's passes: its attention has no tangent."""
    if name == "step":
        return lambda q, k, v, dq, dk, dv, cotangent: jax.vjp(cudnn, q, k, v)[1](cotangent)
    return lambda q, k, v, *_: cudnn(q, k, v)


def timed(function, arguments, repeats: int) -> float:
    """Median seconds of a compiled function."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def measure_one(implementation: str, case: str, tokens: int) -> dict:
    keys = jax.random.split(jax.random.key(0), 7)
    shape = (1, tokens, _HEADS.value, _WIDTH.value)
    arguments = [jax.random.normal(key, shape, _DTYPE.value) for key in keys]
    if implementation == "cudnn":
        function = cudnn_case(case)
    else:
        function = case_of(case, functools.partial(attention, implementation=implementation))
    before = jax.block_until_ready(arguments) and resident()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = timed(compiled, arguments, _REPEATS.value)
    return {
        "seconds": seconds,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "peak_rss_bytes": resident() - before,
    }


def resident() -> int:
    """The most memory that this process has held, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(implementation: str, case: str, tokens: int) -> dict | str:
    """`measure_one` in a process of its own; the last line of its complaint where it fails."""
    command = [sys.executable, *sys.argv, f"--one={implementation},{case},{tokens}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = done.stderr.strip().splitlines() or ["no message"]
        errors = [line for line in complaint if "Error" in line]
        return (errors or complaint)[-1][:300]
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(platform: str) -> None:
    references = ["xla", "cudnn"] if platform == "gpu" else ["xla"]
    if platform != "gpu":
        reason = f"cuDNN and PyTorch kernels need an NVIDIA GPU, this is {platform}"
        print(json.dumps({"benchmark": "attention", "skipped": "cudnn", "reason": reason}))
    for tokens in map(int, _TOKENS.value):
        for case in CASES:
            found: dict[str, list] = {name: [] for name in ("auto", *references)}
            for _ in range(_ROUNDS.value):
                for name, results in found.items():
                    results.append(measure(name, case, tokens))
            for name in references:
                line = {"benchmark": f"attention_{case}", "tokens": tokens, "reference": name}
                line |= {"heads": _HEADS.value, "width": _WIDTH.value, "dtype": _DTYPE.value}
                line["device"] = jax.devices()[0].device_kind
                failed = [x for x in (*found["auto"], *found[name]) if isinstance(x, str)]
                if failed:
                    print(json.dumps(line | {"skipped": failed[0]}), flush=True)
                    continue
                for quantity in found[name][0]:
                    ours, theirs = (
                        statistics.median(x[quantity] for x in found[who]) for who in ("auto", name)
                    )
                    line[quantity], line[f"reference_{quantity}"] = ours, theirs
                    line["ratio" if quantity == "seconds" else f"{quantity}_ratio"] = (
                        ours / theirs if theirs else None
                    )
                print(json.dumps(line), flush=True)


def accuracy() -> None:
    for queries, keys, width in ACCURACY:
        rng = np.random.default_rng(0)
        sizes = (queries, keys, keys, queries, keys, keys, queries)
        made = [rng.standard_normal((1, n, 1, width)) for n in sizes]
        for dtype in (jnp.float32, jnp.bfloat16):
            arguments = [jnp.asarray(x, dtype) for x in made]
            with jax.enable_x64(True):
                exact = [np.asarray(x, np.float64) for x in arguments]
                exact = jax.tree.leaves(jax.jit(case_of("step", plain))(*exact))
                exact = [np.asarray(x) for x in exact]
            errors = {}
            for name in ("xla", *lowering.IMPLEMENTATIONS):
                function = functools.partial(attention, implementation=name)
                found = jax.tree.leaves(jax.jit(case_of("step", function))(*arguments))
                errors[name] = [
                    float(np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y))
                    for x, y in zip(found, exact)
                ]
            for name, values in errors.items():
                line = {"benchmark": "attention_error", "implementation": name}
                line |= {"queries": queries, "keys": keys, "width": width}
                line["dtype"] = jnp.dtype(dtype).name
                line["ratio"] = max(x / y for x, y in zip(values, errors["xla"]))
                line["reference"] = "the same of xla"
                line |= dict(zip(("output", "tangent", "d_query", "d_key", "d_value"), values))
                print(json.dumps(line), flush=True)


def tune(platform: str) -> None:
    kind = "cuda" if platform == "gpu" else "tpu"
    interpret = platform == "cpu"
    module = flash_jvp_gpu if kind == "cuda" else flash_jvp_tpu
    if kind == "cuda":
        sizes = [(a, b) for a in (32, 64, 128) for b in (32, 64, 128)]
        candidates = [Blocks(*x, w, s) for x in sizes for w in (4, 8) for s in (1, 2, 3)]
    else:
        candidates = [Blocks(a, b) for a in (128, 256, 512, 1024) for b in (256, 512, 1024, 2048)]
    if interpret:
        candidates = candidates[:2]
    tokens = 256 if interpret else int(_TOKENS.value[-1])
    heads = 1 if interpret else _HEADS.value
    keys = jax.random.split(jax.random.key(0), 7)
    shape = (1, tokens, heads, _WIDTH.value)
    q, k, v, dq, dk, dv, cotangent = (jax.random.normal(key, shape, _DTYPE.value) for key in keys)
    rows = jnp.zeros((1, heads, tokens), jnp.float32)
    arguments = {
        "forward": (q, k, v, None),
        "forward_tangent": (q, k, v, None, dq, dk, dv),
        "backward": (q, k, v, None, rows, rows, cotangent),
    }
    device = jax.devices()[0].device_kind
    for kernel in KERNELS:
        times = {}
        for blocks in candidates:
            options = {"interpret": interpret, "blocks": blocks}
            run = jax.jit(
                functools.partial(getattr(module, kernel.removesuffix("_tangent")), **options)
            )
            try:
                times[blocks] = timed(run, arguments[kernel], _REPEATS.value)
            except Exception as error:  # too large for the chip
                print(f"{kernel} {blocks}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
        best = min(times, key=times.get)
        now = block_sizes(kind, kernel, _WIDTH.value)
        line = {"benchmark": "attention_tune", "kernel": kernel, "seconds": times[best]}
        line["ratio"] = times[best] / times[now] if now in times else None
        line |= {"reference": f"{tuple(now)}, of the table", "interpreted": interpret}
        line["row"] = f"({kind!r}, {device!r}, {_WIDTH.value}, {kernel!r}): {best},"
        print(json.dumps(line), flush=True)


def main(argv):
    del argv
    if _ONE.value:
        implementation, case, tokens = _ONE.value
        print(json.dumps(measure_one(implementation, case, int(tokens))))
        return
    platform = jax.default_backend()
    if _ACCURACY.value:
        accuracy()
    elif _TUNE.value:
        tune(platform)
    else:
        compare(platform)


if __name__ == "__main__":
    app.run(main)
