"""Requests to the server one by one and all at once, and how long starts take.

    python benchmarks/serving.py [--checkpoint=embedded] [--requests=50] [--steps=2] [--repeats=3]
        [--batch_size=8] [--nostarts]

A server is started on this machine, with a queue that holds all requests. All are sent in turn,
each when the last is answered, then all at once. Every picture is compared with the one that
`jax_distill.load` draws of the same prompt and seed alone. The first line of JSON has `ratio`, the
throughput of all at once over that of one by one (the median of the repeats), the number of lost
and of differing pictures, and percentiles of the time to an answer. A picture is lost if its
request fails in whatever way; why the first one did is printed, and there is no ratio then.

The second line is the same with `--batch_size=1`, where the server draws a picture per core at a
time: what batches add to that is the first ratio over the second.

The third has the seconds from a command to its first picture with an empty folder of compiled
programs, and with what that start left there; `ratio` is the larger of the second over the first.
Beside other work on the machine, `time_cpu_sec` tells more: the processors' time of the process.
"""

import http.client
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
import urllib.error
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
        self._said = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, "--port=0", *flags],
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, **environment},
        )
        line = self._process.stdout.readline()
        self.seconds = time.perf_counter() - began
        address = re.match(r"http://localhost:\d+", line)
        if address is None:
            self._process.kill()
            self._process.wait()
            printed = (line + self._log()).strip() or "nothing"
            raise SystemExit(f"error: the server did not start; it printed: {printed}")
        self._address = address[0]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        sys.stderr.write(self._log())

    def _log(self) -> str:
        self._said.seek(0)
        return self._said.read()

    def picture(self, **parameters) -> tuple[bytes, float]:
        """A picture's file, and the seconds it took.

        Raises:
          OSError: there is no answer, or another status; an HTTPException, if the answer is cut.
        """
        began = time.perf_counter()
        with urllib.request.urlopen(f"{self._address}/image?{urlencode(parameters)}") as answer:
            return answer.read(), time.perf_counter() - began

    def try_picture(self, **parameters) -> tuple[bytes, float] | Exception:
        """As `picture`, but returns what it would raise."""
        try:
            return self.picture(**parameters)
        except urllib.error.HTTPError as error:
            return OSError(f"{error}: {error.read().decode(errors='replace').strip()}")
        except (OSError, http.client.HTTPException) as error:
            return error


def wanted(index: int) -> dict:
    return {"prompt": PROMPTS[index % len(PROMPTS)], "steps": _STEPS.value, "seed": index}


def alone() -> list[np.ndarray]:
    """The pictures that the server must draw."""
    pipe = jax_distill.load(_CHECKPOINT.value)
    return [pipe(**drawn_alone(index))[0] for index in range(_REQUESTS.value)]


def throughput(batch_size: int, expected: list[np.ndarray]) -> dict:
    """What a server with batches of that size does.

    Args:
      batch_size: as of jax_distill.serve.
      expected: a picture per request.
    """
    count = len(expected)
    with (
        Server(f"--queue={max(count, 16)}", f"--batch_size={batch_size}") as server,
        ThreadPoolExecutor(count) as clients,
    ):

        def once(order) -> tuple[float, list]:
            began = time.perf_counter()
            found = list(order(lambda index: server.try_picture(**wanted(index)), range(count)))
            return time.perf_counter() - began, found

        asked = once(clients.map)[1]  # what is not compiled yet is not timed
        one_by_one, at_once, answers = [], [], []
        for _ in range(_REPEATS.value):
            for order, seconds in ((map, one_by_one), (clients.map, at_once)):
                took, found = once(order)
                seconds.append(took)
                asked += found
            answers += [(i, *x) for i, x in enumerate(found) if not isinstance(x, Exception)]
    lost = [answer for answer in asked if isinstance(answer, Exception)]
    if lost:
        print(f"{len(lost)} pictures are lost, the first one to: {lost[0]}", file=sys.stderr)
    differing = sum(not np.array_equal(pixels(png), expected[index]) for index, png, _ in answers)
    took = np.array([seconds for *_, seconds in answers])
    slow, fast = statistics.median(one_by_one), statistics.median(at_once)
    return {
        "benchmark": "serving, all at once over one by one",
        "batch_size": batch_size,
        "ratio": None if lost else round(slow / fast, 2),
        "requests": count,
        "steps": _STEPS.value,
        "lost": len(lost),
        "differing": differing,
        "pictures_per_sec": {
            "one_by_one": round(count / slow, 1),
            "at_once": round(count / fast, 1),
        },
        "time_ms": {p: milliseconds(took, p) for p in (50, 95, 100) if answers},
    }


def milliseconds(seconds: np.ndarray, percentile: int) -> int:
    return round(1000 * float(np.percentile(seconds, percentile)))


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
    expected = alone()
    for batch_size in dict.fromkeys((_BATCH_SIZE.value, 1)):
        print(json.dumps(throughput(batch_size, expected)), flush=True)
    if _STARTS.value:
        print(json.dumps(starts()))


if __name__ == "__main__":
    app.run(main)
