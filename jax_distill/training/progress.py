"""Progress of a run: the terminal, metrics.jsonl and TensorBoard."""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import TypedDict

from absl import logging

from jax_distill.devices import processes
from jax_distill.storage import paths
from jax_distill.storage.files import FileError, check_regular, parse_json, write_atomically

METRICS = "metrics.jsonl"
PAUSE = 30.0
"""Seconds at least between copies of the files of a run in a bucket, where nothing is appended."""


class Report:
    """Progress on the terminal, TensorBoard events, and one line of metrics.jsonl a logged step.

    In a bucket, where objects are written whole, the files grow on a disk of this host, and are
    copied now and then, before each checkpoint, and at the end.

    A line holds the means over the steps since the line before, of finite values; null where there
    are none. It says nothing of a player that has not moved since.

    Args:
      workdir: where metrics.jsonl and the event files go.
      total: steps to take in all.
      batch_size: examples a step.
    """

    def __init__(self, workdir: Path, total: int, batch_size: int):
        self._workdir, self._total, self._batch_size = workdir, total, batch_size
        self._writer = None
        self._local = workdir
        self._copied: dict[str, int] = {}  # sizes of the files when they were copied
        self._next_copy = 0.0
        self.window: dict[str, list[float]] = {}  # of each metric, the sum and the count

    def begin(self, start: int, window: dict[str, list[float]]) -> None:
        """Opens the files; lines of steps that will be taken again are dropped.

        Args:
          start: steps taken before.
          window: that of the report that saved them.
        """
        self.window = window
        self._begun = time.monotonic()
        self.start_clock(start)
        if processes.is_leader():
            from clu import metric_writers  # brings TensorFlow: seconds that only training pays

            _forget_after(self._workdir / METRICS, start)
            if paths.is_bucket(self._workdir):
                self._temporary = tempfile.TemporaryDirectory(prefix="jax_distill-")
                self._local = Path(self._temporary.name)
                if (before := self._workdir / METRICS).exists():
                    (self._local / METRICS).write_bytes(before.read_bytes())
            self._writer = metric_writers.create_default_writer(
                str(self._local), just_logging=False, asynchronous=True
            )

    def start_clock(self, step: int) -> None:
        """Throughput and the time left count from here, where so many steps are taken."""
        self._start = self._last_step = step
        self._clock_start = self._last = time.monotonic()

    def add(self, metrics: dict[str, float]) -> None:
        """Takes in the metrics of one step."""
        for name, value in metrics.items():
            total, count = self.window.get(name, (0.0, 0))
            if math.isfinite(value):
                total, count = total + value, count + 1
            self.window[name] = [total, count]
        for name in filter(_is_count, metrics):
            self.window[name] = [metrics[name], 1]

    def write(self, step: int, rates: dict[str, float]) -> None:
        """Writes a line and begins the next.

        Args:
          step: steps taken.
          rates: learning rates, by their names in the line.
        """
        mean = {name: sum_ / n if n else None for name, (sum_, n) in self.window.items()}
        mean |= {name: int(mean[name]) for name in filter(_is_count, mean)}
        self.window = {}
        now = time.monotonic()
        rate = (step - self._last_step) / max(now - self._last, 1e-9)
        left = (self._total - step) * (now - self._clock_start) / max(step - self._start, 1)
        self._last, self._last_step = now, step
        if self._writer is None:
            return
        losses = {name: value for name, value in mean.items() if _kind(name) == "loss"}
        line = {
            **losses,
            **mean,
            **rates,
            "steps_per_sec": rate,
            "examples_per_sec": rate * self._batch_size,
            "time": now - self._begun,
        }
        with (self._local / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")
        self._writer.write_scalars(step, {k: v for k, v in line.items() if v is not None})
        if time.monotonic() >= self._next_copy:
            self.flush()
        shown = "  ".join(
            f"{name} not finite" if value is None else f"{name} {value:.4f}"
            for name, value in losses.items()
        )
        examples = line["examples_per_sec"]
        logging.info(
            "step %d/%d  %s  %s examples/s  %s left",
            *(step, self._total, shown),
            f"{examples:.0f}" if examples >= 10 else f"{examples:.1f}",
            clock(left),
        )

    def flush(self) -> None:
        """Copies the files into the bucket that the run is in."""
        if self._writer is not None and self._local != self._workdir:
            self._writer.flush()
            self._copy()

    def _copy(self) -> None:
        began = time.monotonic()
        for path in sorted(self._local.iterdir()):
            size = path.stat().st_size
            if self._copied.get(path.name) != size:
                write_atomically(self._workdir / path.name, path.read_bytes())
                self._copied[path.name] = size
        took = time.monotonic() - began
        self._next_copy = time.monotonic() + max(PAUSE, 20 * took)

    def close(self) -> None:
        """Writes out what TensorBoard has not got yet."""
        if self._writer is not None:
            self._writer.close()
            if self._local != self._workdir:
                self._copy()
                self._temporary.cleanup()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _kind(name: str) -> str:
    """A metric's name without the player's."""
    return name.rpartition("/")[2]


def _is_count(name: str) -> bool:
    """Whether a metric is a count already, of which no mean is taken."""
    return _kind(name) == "skipped"


class _Line(TypedDict):
    step: int


def _forget_after(path: Path, step: int) -> None:
    """Drops the lines of later steps, and what a killed run left half written, atomically."""
    if not path.exists():
        return
    check_regular(path)
    kept = []
    # Bytes that are no text, such as zeros after a loss of power, spoil their line alone.
    with path.open("rb") as file:
        content = file.read().decode(errors="replace")
    for number, text in enumerate(filter(str.strip, content.split("\n")), 1):
        try:
            line = parse_json(text, _Line, where=f"'{path}', line {number}", fix="it is left out")
        except FileError as error:
            logging.warning("%s", error)
            continue
        if line["step"] <= step:
            kept.append(text + "\n")
    write_atomically(path, "".join(kept))


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
