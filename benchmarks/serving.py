"""Requests to the server one by one and all at once, and how long starts take.

    python benchmarks/serving.py [--checkpoint=embedded] [--requests=50] [--steps=2] [--repeats=3]
        [--batch_size=8] [--nostarts]

A server is started on this machine, with a queue that holds all requests. All are sent in turn,
each when the last is answered, then all at once. Every picture is compared with the one that
`jax_distill.load` draws of the same prompt and seed alone. The first line of JSON has `ratio`, the
throughput of all at once over that of one by one (the median of the repeats), the number of lost
and of differing pictures, and percentiles of the time to an answer.

The second has the seconds from a command to its first picture with an empty folder of compiled
programs, and with what that start left there; `ratio` is the larger of the second over the first.
Beside other work on the machine, `time_cpu_sec` tells more: the processors' time of the process.
"""

import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
from absl import app, flags
from PIL import Image

import jax_distill

_CHECKPOINT = flags.DEFINE_string("checkpoint", "embedded", "As of jax_distill.serve.")
_REQUESTS = flags.DEFINE_integer("requests", 50, "Pictures, each with a seed of its own.", 1)
_STEPS = flags.DEFINE_integer("steps", 2, "Of the sampler.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Of both ways, in turn.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "As of jax_distill.serve.", 1)
_STARTS = flags.DEFINE_boolean("starts", True, "Time starts, too.")

PROMPTS = ("a red circle", "two blue squares", "a green triangle above a yellow cross")


class Server:
    """`jax_distill.serve` on a free port; `seconds` is how long it took to be ready."""

    def __init__(self, *flags: str, **environment: str):
        command = [sys.executable, "-m", "jax_distill.serve", f"--checkpoint={_CHECKPOINT.value}"]
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, "--port=0", *flags],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        line = self._process.stdout.readline()
        self.seconds = time.perf_counter() - began
        self._address = re.match(r"http://localhost:\d+", line)[0]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def picture(self, **parameters) -> tuple[bytes, float]:
        """A picture's file, and the seconds it took."""
        began = time.perf_counter()
        with urllib.request.urlopen(f"{self._address}/image?{urlencode(parameters)}") as answer:
            return answer.read(), time.perf_counter() - began


def wanted(index: int) -> dict:
    return {"prompt": PROMPTS[index % len(PROMPTS)], "steps": _STEPS.value, "seed": index}


def throughput() -> dict:
    count = _REQUESTS.value
    pipe = jax_distill.load(_CHECKPOINT.value)
    alone = [pipe(**drawn_alone(index))[0] for index in range(count)]
    with Server(f"--queue={max(count, 16)}", f"--batch_size={_BATCH_SIZE.value}") as server:
        with ThreadPoolExecutor(count) as clients:

            def once(order) -> tuple[float, list]:
                began = time.perf_counter()
                found = list(order(lambda index: server.picture(**wanted(index)), range(count)))
                return time.perf_counter() - began, found

            once(clients.map)  # what is not compiled yet is not timed
            one_by_one, at_once, answers = [], [], []
            for _ in range(_REPEATS.value):
                one_by_one.append(once(map)[0])
                seconds, found = once(clients.map)
                at_once.append(seconds)
                answers += [(index, *answer) for index, answer in enumerate(found)]
    differing = sum(not np.array_equal(pixels(png), alone[index]) for index, png, _ in answers)
    took = np.array([seconds for *_, seconds in answers])
    slow, fast = statistics.median(one_by_one), statistics.median(at_once)
    return {
        "benchmark": "serving, all at once over one by one",
        "ratio": round(slow / fast, 2),
        "requests": count,
        "steps": _STEPS.value,
        "lost": count * _REPEATS.value - len(answers),
        "differing": differing,
        "pictures_per_sec": {
            "one_by_one": round(count / slow, 1),
            "at_once": round(count / fast, 1),
        },
        "time_ms": {p: round(1000 * float(np.percentile(took, p))) for p in (50, 95, 100)},
    }


def drawn_alone(index: int) -> dict:
    given = wanted(index)
    return {"prompts": given["prompt"], "steps": given["steps"], "seed": given["seed"]}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def starts() -> dict:
    """Seconds to the first picture of `sample` and of `serve`, without and with programs kept."""
    found: dict[str, list[float]] = {"sample": [], "serve": []}
    processors: dict[str, list[float]] = {"sample": [], "serve": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, start in (("sample", start_of_sample), ("serve", start_of_serve)):
            kept = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": f"{folder}/{name}"}
            for _ in range(2):
                before = spent_by_children()
                found[name].append(round(start(kept), 2))
                processors[name].append(round(spent_by_children() - before, 2))
    ratios = {name: round(warm / cold, 2) for name, (cold, warm) in found.items()}
    return {
        "benchmark": "start with compiled programs kept over without",
        "ratio": max(ratios.values()),
        "ratios": ratios,
        "time_sec": found,
        "time_cpu_sec": processors,
    }


def spent_by_children() -> float:
    """Seconds of processors that ended processes have taken."""
    times = os.times()
    return times.children_user + times.children_system


def start_of_sample(environment: dict[str, str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.png"
        command = [sys.executable, "-m", "jax_distill.sample", "--prompt=a red circle"]
        command += [f"--checkpoint={_CHECKPOINT.value}", f"--steps={_STEPS.value}"]
        began = time.perf_counter()
        subprocess.run(
            [*command, f"--output={output}"],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return time.perf_counter() - began


def start_of_serve(environment: dict[str, str]) -> float:
    with Server(**environment) as server:
        return server.seconds + server.picture(**wanted(0))[1]


def main(argv: list[str]) -> None:
    del argv
    print(json.dumps(throughput()), flush=True)
    if _STARTS.value:
        print(json.dumps(starts()))


if __name__ == "__main__":
    app.run(main)
