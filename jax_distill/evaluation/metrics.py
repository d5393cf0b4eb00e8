"""Metrics that a run logged while it trained, as metrics.jsonl holds them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from jax_distill.storage.files import FileError, check_regular, encoding_of

MOST_LINES = 100_000  # that are kept; a plot shows fewer
MOST_BYTES = 2**29  # of a file: over a million lines
MOST_NAMES = 200
_LINE_LENGTH = 2**20
_DRAWN = 1e100  # above, the arithmetic of a plot's axes ends in infinity
_numbers = msgspec.json.Decoder(dict[str, float]).decode


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl: the logged lines by ascending step, and how many could not be read.

    One of `stride` lines is kept.
    """

    lines: list[dict[str, float]]
    unreadable: int
    stride: int = 1

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for line in self.lines for name in line))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of a metric that a plot can show, both (n,)."""
        points = [
            (line["step"], line[name])
            for line in self.lines
            if name in line and abs(line[name]) < _DRAWN
        ]
        return tuple(np.array(points, np.float64).reshape(-1, 2).T)

    @property
    def last_step(self) -> int:
        return int(self.lines[-1]["step"])

    @property
    def seconds(self) -> float:
        """Time trained: `time` counts from the start of each of a resumed run's processes."""
        _, times = self.series("time")
        elapsed = np.diff(times, prepend=0.0)
        return float(np.where(elapsed < 0, times, elapsed).sum())


def read_metrics(path: Path) -> Metrics | None:
    """Reads a metrics.jsonl as far as it is readable; None if there is no line to show.

    Of more than `MOST_LINES` steps every second, fourth, .. is kept; of more than `MOST_NAMES`
    metrics the first ones.

    Raises:
      FileError: it is no regular file, or too large.
    """
    if not path.exists():
        return None
    by_step: dict[int, dict[str, float]] = {}
    names: dict[str, str] = {}  # each once in memory, however many lines have it
    unreadable, stride = 0, 1
    for text in _texts(path):
        line = None if text is None else _line(text, names)
        if line is None:
            unreadable += text is None or bool(text.strip())
            continue
        by_step[int(line["step"])] = line
        if len(by_step) > 2 * MOST_LINES:
            by_step = {step: by_step[step] for step in sorted(by_step)[::2]}
            stride *= 2
    lines = [by_step[step] for step in sorted(by_step)]
    return Metrics(lines, unreadable, stride) if lines else None


def _texts(path: Path) -> Iterator[str | None]:
    """The lines of a file; None for one that is too long, of which no more is read at once."""
    check_regular(path)
    if path.stat().st_size > MOST_BYTES:
        size = f"{path.stat().st_size >> 20} MiB, more than the {MOST_BYTES >> 20} MiB"
        raise FileError(f"'{path}' has {size} that a report is made of; shorten or remove it")
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    # Bytes that are no text spoil only their own line.
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    with path.open(encoding=encoding, errors=errors, newline="\n") as file:
        whole = True
        while text := file.readline(_LINE_LENGTH):
            ended = len(text) < _LINE_LENGTH or text.endswith("\n")
            if whole and ended:
                yield text
            elif ended:
                yield None
            whole = ended
        if not whole:
            yield None


def _is_name(text: str) -> bool:
    return len(text) <= 80 and text.isprintable()


def _line(text: str, names: dict[str, str]) -> dict[str, float] | None:
    """The numbers of a line, with its step; None for any other line."""
    try:
        line = _numbers(text)
        if line.keys() <= names.keys():
            return line if _is_step(line.get("step", math.nan)) else None
    except (msgspec.DecodeError, ValueError):  # more than numbers, or NaN, which is Python's own
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            return None
    if not isinstance(line, dict):
        return None
    numbers = {}
    for name, value in line.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not _is_name(name):
                return None
            if name not in names and len(names) < MOST_NAMES:
                names[name] = name
            try:
                if name in names:
                    numbers[names[name]] = float(value)
            except OverflowError:
                return None
    return numbers if _is_step(numbers.get("step", math.nan)) else None


def _is_step(value: float) -> bool:
    return 0 <= value < 2**53 and value == int(value)
