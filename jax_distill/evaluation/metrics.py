"""What a run logged while it trained, as metrics.jsonl holds it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl: the logged lines by ascending step, and how many could not be read."""

    lines: list[dict[str, float]]
    unreadable: int

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for line in self.lines for name in line))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of a metric, both (n,)."""
        points = [
            (line["step"], line[name])
            for line in self.lines
            if name in line and math.isfinite(line[name])
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
    """Reads what can be read of a metrics.jsonl; None if there is no line to show."""
    if not path.exists():
        return None
    by_step, unreadable = {}, 0
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            line = {
                name: float(value)
                for name, value in line.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            by_step[int(line["step"])] = line
        except (ValueError, AttributeError, KeyError, OverflowError):  # not JSON, or no step
            unreadable += bool(text.strip())
    lines = [by_step[step] for step in sorted(by_step)]
    return Metrics(lines, unreadable) if lines else None
