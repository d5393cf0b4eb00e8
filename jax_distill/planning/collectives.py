"""Exchanges between chips, read from a compiled program."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|async_execution)=\{?([^}\s]+)")
_ARRAY = re.compile(r"\b([a-z]+\d+)\w*\[([\d,]*)\]")
_BODY = re.compile(r" while\(.* body=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of a compiled program.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the whole array that is gathered, reduced or scattered, on one chip, once.
      group: chips that exchange.
      times: in a step.
      loops: how many loops it is in.
      name: of the instruction.
    """

    kind: str
    bytes: int
    group: int
    times: int
    loops: int
    name: str

    @property
    def received(self) -> float:
        """Bytes that a chip takes in from others, at least, in a step."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes * self.times


def collectives(hlo: str, chips: int) -> list[Collective]:
    """All exchanges of a compiled program, with the trip counts of the loops that they are in.

    Args:
      hlo: `compiled.as_text()`.
      chips: how many it is compiled for.

    Raises:
      ValueError: a loop whose trip count the program does not tell holds an exchange.
    """
    computations, entry = _computations(hlo)
    found: dict[tuple[str, str], tuple[str, int, int]] = {}
    times: dict[tuple[str, str], int] = defaultdict(int)
    depth: dict[tuple[str, str], int] = {}

    def visit(computation: str, count: int, loops: int) -> None:
        for line in computations.get(computation, ()):
            name = line.split(" = ")[0].split()[-1].lstrip("%")
            if operation := _OPERATION.search(line):
                group = _group_size(line, chips)
                if group > 1:
                    key = (computation, name)
                    result = line[: operation.start()].split(" = ", 1)[1]
                    kind, size = operation[1], _whole(result, operation[1], operation[2], group)
                    if kind == "all-reduce" and "all-reduce-scatter" in computation:
                        kind = "reduce-scatter"  # how the TPU compiler writes it
                    found[key] = kind, size, group
                    times[key] += count
                    depth[key] = max(depth.get(key, 0), loops)
                continue
            if re.search(r" async-(?:done|update)\(", line):
                continue
            body = _BODY.search(line)
            for callee in _called(line):
                if callee not in busy:
                    continue
                if body and callee == body[1]:
                    visit(callee, count * _trips(line, name, computations), loops + 1)
                else:
                    visit(callee, count, loops)

    busy = _holding(computations)
    visit(entry, 1, 0)
    return [
        Collective(*found[key], times[key], depth[key], key[1])
        for key in sorted(found, key=lambda key: -found[key][1] * times[key])
    ]


def totals(exchanges: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """By kind: how many exchanges a step has, and their bytes on a chip."""
    result: dict[str, dict[str, int]] = {}
    for exchange in exchanges:
        entry = result.setdefault(exchange.kind, {"count": 0, "bytes": 0})
        entry["count"] += exchange.times
        entry["bytes"] += exchange.bytes * exchange.times
    return result


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation that say more than arithmetic, and the entry's name."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if not line.startswith(" ") and (header := _HEADER.match(line)):
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif " = " in line:
            lines.append(line)
    return computations, entry


def _called(line: str) -> list[str]:
    return [name.lstrip("%") for match in _CALLED.findall(line) for name in match.split(",")]


def _holding(computations: Mapping[str, list[str]]) -> set[str]:
    """Computations that hold an exchange, themselves or in what they call."""
    callers = defaultdict(set)
    frontier = []
    for name, lines in computations.items():
        for line in lines:
            for callee in _called(line):
                callers[callee].add(name)
        if any(_OPERATION.search(line) for line in lines):
            frontier.append(name)
    holding: set[str] = set()
    while frontier:
        name = frontier.pop()
        if name not in holding:
            holding.add(name)
            frontier.extend(callers[name])
    return holding


def _trips(line: str, name: str, computations: Mapping[str, list[str]]) -> int:
    """Trip count of a loop: noted by the compiler, or the bound in its condition."""
    if noted := re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', line):
        return int(noted[1])
    condition = re.search(r" condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    constants = [
        int(n) for text in lines for n in re.findall(r"[su]32\[\][^ ]* constant\((\d+)\)", text)
    ]
    if len(constants) == 1:
        return constants[0]
    raise ValueError(f"loop {name} exchanges data and its trip count is not known")


def _group_size(line: str, chips: int) -> int:
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    return chips  # all, or pairs of a permutation


def _whole(result: str, kind: str, started: str | None, group: int) -> int:
    total = sum(_bytes(*array) for array in _ARRAY.findall(result))
    if kind == "all-gather" and started:  # operands and results
        return total * group // (group + 1)
    if kind == "collective-permute" and started:
        return total // 2
    return total * group if kind == "reduce-scatter" else total


def _bytes(dtype: str, dimensions: str) -> int:
    size = 1
    for dimension in dimensions.split(","):
        size *= int(dimension or 1)
    return size * int(re.sub(r"\D", "", dtype)) // 8
