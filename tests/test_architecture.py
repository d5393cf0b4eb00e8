"""Paths, links and commands in the documents exist, and every room of the package is listed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jax_distill"
ARCHITECTURE = ROOT / "docs/architecture.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("benchmarks", "configs", "docs", "jax_distill", "launch", "tests")


def paths_in(text):
    """Paths of the repository, wherever they stand in a text, and Python files in backticks."""
    anywhere = re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w/?", text)
    quoted = re.findall(r"`([\w./-]+\.py)`", text)
    return {*anywhere, *quoted}


def exists(path):
    return (ROOT / path).exists() or (PACKAGE / path).exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_exists(document):
    missing = {path for path in paths_in(document.read_text()) if not exists(path)}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_exists(document):
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_exists_and_has_its_flags(document):
    text = document.read_text().replace("\\\n", " ")
    for module, arguments in re.findall(r"-m jax_distill\.(\w+)([^`\n]*)", text):
        programs = [PACKAGE / f"{module}.py", PACKAGE / "devices/processes.py"]
        source = "\n".join(program.read_text() for program in programs)
        known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source))
        known |= {"config"} if "config_flag.define(" in source else set()
        assert set(re.findall(r"--(\w+)", arguments)) <= known, module


def test_every_path_of_the_architecture_exists():
    quoted = re.findall(r"`([\w.-]+/[\w./-]*)`", ARCHITECTURE.read_text())
    assert len(quoted) > 40
    assert [path for path in quoted if not exists(path)] == []


def test_every_room_is_listed_and_nothing_else():
    rooms = re.search(r"## Rooms\n(.*?)\n## ", ARCHITECTURE.read_text(), re.DOTALL)[1]
    cells = [line.split("|")[1] for line in rooms.splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`([\w.]+)/?`", cell)}
    found = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    found |= {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert listed == found
