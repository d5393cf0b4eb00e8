"""The order of rooms: modules import their own room and lower ones, in no circle."""

import ast
import graphlib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jax_distill"
ROOMS = (
    *("ops", "devices", "storage", "flow", "sampling", "streams", "models", "objectives", "data"),
    *("config", "training", "interop", "worlds", "assembly", "pipeline", "evaluation", "planning"),
    *("serving", "runs", "commands"),
)
"""From low to high: folders and modules of the package; "commands" are its other modules."""


def imports(source: str, known: Set[str]) -> Iterator[str]:
    """Modules among `known` that a file imports, wherever in it: in functions, for types alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "an import relative to its own module is not followed"
            for alias in node.names:
                found = {f"{node.module}.{alias.name}"} & known or {node.module} & known
                yield from found


def graph() -> dict[str, set[str]]:
    """Every module of the package and the modules that it imports."""
    files = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in PACKAGE.rglob("*.py")
    }
    return {module: set(imports(path.read_text(), files.keys())) for module, path in files.items()}


def room(module: str) -> str:
    _, *path = module.split(".")
    return path[0] if len(path) > 1 or (path and path[0] in ROOMS) else "commands"


def check(edges: Mapping[str, set[str]]) -> None:
    """Raises AssertionError for imports of higher rooms, CycleError for a circle."""
    upward = [
        f"{module} imports {other}"
        for module, others in edges.items()
        for other in others
        if ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert not upward, "; ".join(sorted(upward))
    graphlib.TopologicalSorter(edges).prepare()


def test_imports_run_downwards_and_in_no_circle():
    edges = graph()
    assert {room(module) for module in edges} == set(ROOMS)  # none of them is a name alone
    assert sum(map(len, edges.values())) > len(edges)
    check(edges)


@pytest.mark.parametrize(
    "text",
    [
        "from jax_distill.runs import checks",
        "import jax_distill.runs.checks as other",
        "def late():\n    from jax_distill.runs.checks import check",
        "if TYPE_CHECKING:\n    from jax_distill.runs.checks import check",
    ],
)
def test_every_form_of_an_import_is_seen(text):
    known = {"jax_distill.runs", "jax_distill.runs.checks", "jax_distill.flow"}
    assert set(imports(text, known)) == {"jax_distill.runs.checks"}
    with pytest.raises(AssertionError, match="jax_distill.flow imports jax_distill.runs.checks"):
        check({"jax_distill.flow": set(imports(text, known))})


def test_a_circle_within_a_room_is_seen():
    a, b, c = (f"jax_distill.models.{name}" for name in "abc")
    check({a: {b}, b: {c}})
    with pytest.raises(graphlib.CycleError):
        check({a: {b}, b: {c}, c: {a}})
