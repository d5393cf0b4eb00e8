"""Time, memory and error of attention with its derivatives, one JSON line each.

    python benchmarks/attention.py [--tokens=1280,4352] [--heads=24] [--dtype=bfloat16]
    python benchmarks/attention.py --accuracy
    python benchmarks/attention.py --tune > rows.jsonl
    python benchmarks/attention.py --rows=rows.jsonl

By default: the time of the forward pass, of it with its tangent, and of both with the gradient
beside the stopped tangent (the training step), of what "auto" chooses here, against plain XLA and,
on NVIDIA GPUs, against cuDNN's attention, whose forward and backward pass without any tangent are
the floor. Implementations take turns; on CPUs every measurement is a process of its own, so that
its peak memory is its own. What cannot be measured here is reported as skipped. `ratio` is ours
over the reference that the line names; `tflops` counts the products of the formulas alone.

--accuracy compares every implementation with float64, in the Euclidean norm: on CPUs all of them,
the kernels interpreted. --tune times block sizes and prints rows for
`jax_distill/ops/attention/block_sizes.py`, which --rows takes in place of the table's; on CPUs that
shows only that the kernels run.
"""

import concurrent.futures
import functools
import json
import os
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
from jax_distill.ops.attention.block_sizes import KERNELS, TABLE, Blocks, block_sizes
from jax_distill.planning.flops import count_flops

CASES = ("forward", "forward_tangent", "step")
LEAST_SECONDS = 0.05  # of the calls that are timed together
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
_ROWS = flags.DEFINE_list("rows", [], "Files that --tune has printed: their block sizes are used.")
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
    """Median seconds of a call of a compiled function, from calls that follow without a pause."""

    def seconds(calls: int) -> float:
        begun = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - begun) / calls

    seconds(1)
    calls = min(100, 1 + int(LEAST_SECONDS / seconds(1)))
    return statistics.median(seconds(calls) for _ in range(repeats))


def arguments_of(tokens: int) -> list[jax.Array]:
    """Query, key, value, their tangents, and a cotangent."""
    shape = (1, tokens, _HEADS.value, _WIDTH.value)
    keys = jax.random.split(jax.random.key(0), 7)
    return [jax.random.normal(key, shape, _DTYPE.value) for key in keys]


@functools.cache
def compiled(implementation: str, case: str, tokens: int):
    if implementation == "cudnn":
        function = cudnn_case(case)
    else:
        function = case_of(case, functools.partial(attention, implementation=implementation))
    return jax.jit(function).lower(*arguments_of(tokens)).compile()


def measure_one(implementation: str, case: str, tokens: int) -> dict:
    """Seconds and bytes of one implementation, in this process."""
    arguments = jax.block_until_ready(arguments_of(tokens))
    before = resident()
    run = compiled(implementation, case, tokens)
    found = {"seconds": timed(run, arguments, _REPEATS.value)}
    found["temporary_bytes"] = run.memory_analysis().temp_size_in_bytes
    if jax.default_backend() == "cpu":
        found["peak_rss_bytes"] = resident() - before
    return found


def resident() -> int:
    """The most memory that this process has held, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(implementation: str, case: str, tokens: int) -> dict | str:
    """`measure_one`, on CPUs in a process of its own; the complaint in a line where it fails."""
    if jax.default_backend() != "cpu":
        try:
            return measure_one(implementation, case, tokens)
        except Exception as error:  # of a library that does not take this case, or of memory
            return f"{type(error).__name__}: {error}".splitlines()[0][:300]
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
        reason = f"cuDNN's kernels need an NVIDIA GPU, this is {platform}"
        print(json.dumps({"benchmark": "attention", "skipped": "cudnn", "reason": reason}))
    for tokens in map(int, _TOKENS.value):
        for case in CASES:
            found: dict[str, list] = {name: [] for name in ("auto", *references)}
            for _ in range(_ROUNDS.value):
                for name, results in found.items():
                    results.append(measure(name, case, tokens))
            for name in references:
                report(case, tokens, found["auto"], name, found[name])


def report(case: str, tokens: int, ours: list, name: str, theirs: list) -> None:
    """Prints the line of one case against one reference, of what `measure` found of both."""
    line = {"benchmark": f"attention_{case}", "tokens": tokens, "reference": name}
    line |= {"heads": _HEADS.value, "width": _WIDTH.value, "dtype": _DTYPE.value}
    line["device"] = jax.devices()[0].device_kind
    failed = [x for x in (*ours, *theirs) if isinstance(x, str)]
    if failed:
        print(json.dumps(line | {"skipped": failed[0]}), flush=True)
        return
    for quantity in theirs[0]:
        one, other = (statistics.median(x[quantity] for x in results) for results in (ours, theirs))
        line[quantity], line[f"reference_{quantity}"] = one, other
        ratio = "ratio" if quantity == "seconds" else f"{quantity}_ratio"
        line[ratio] = one / other if other else None
    function = case_of(case, functools.partial(attention, implementation="auto"))
    line["tflops"] = count_flops(function, *arguments_of(tokens)) / line["seconds"] / 1e12
    print(json.dumps(line), flush=True)


def accuracy(platform: str) -> None:
    names = ["xla", *lowering.IMPLEMENTATIONS]
    if platform != "cpu":
        kernels = lowering.KERNELS["cuda" if platform == "gpu" else platform]
        names = ["xla", "blocked", kernels]
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
            for name in names:
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
    q, k, v, dq, dk, dv, cotangent = arguments_of(tokens)
    rows = jnp.zeros((1, _HEADS.value, tokens), jnp.float32)
    arguments = {
        "forward": (q, k, v, None),
        "forward_tangent": (q, k, v, None, dq, dk, dv),
        "backward": (q, k, v, None, rows, rows, cotangent),
    }
    device = jax.devices()[0].device_kind
    for kernel in KERNELS:
        function = getattr(module, kernel.removesuffix("_tangent"))

        def made(blocks, function=function, operands=arguments[kernel]):
            run = jax.jit(functools.partial(function, interpret=interpret, blocks=blocks))
            return run.lower(*operands).compile()

        times = {}
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting = {blocks: pool.submit(made, blocks) for blocks in candidates}
            concurrent.futures.wait(waiting.values())
        for blocks, program in waiting.items():
            try:
                times[blocks] = timed(program.result(), arguments[kernel], _REPEATS.value)
            except Exception as error:  # too large for the chip
                print(f"{kernel} {blocks}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
        if not times:
            continue
        best = min(times, key=times.get)
        now = block_sizes(kind, kernel, _WIDTH.value)
        line = {"benchmark": "attention_tune", "kernel": kernel, "seconds": times[best]}
        line["ratio"] = times[best] / times[now] if now in times else None
        line |= {"reference": f"{tuple(now)}, of the table", "interpreted": interpret}
        line["next"] = {str(tuple(x)): times[x] for x in sorted(times, key=times.get)[1:4]}
        line["key"], line["blocks"] = (kind, device, _WIDTH.value, kernel), best
        line["row"] = f"{line['key']}: {best},"
        print(json.dumps(line), flush=True)


def take_rows(paths: list[str]) -> None:
    for path in paths:
        with open(path) as lines:
            for line in map(json.loads, lines):
                TABLE[tuple(line["key"])] = Blocks(*line["blocks"])


def main(argv):
    del argv
    take_rows(_ROWS.value)
    if _ONE.value:
        implementation, case, tokens = _ONE.value
        print(json.dumps(measure_one(implementation, case, int(tokens))))
        return
    platform = jax.default_backend()
    if _ACCURACY.value:
        accuracy(platform)
    elif _TUNE.value:
        tune(platform)
    else:
        compare(platform)


if __name__ == "__main__":
    app.run(main)
