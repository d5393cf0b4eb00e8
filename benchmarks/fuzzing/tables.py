"""Results, metrics and configurations: JSON that the program itself has written."""

import importlib.util
import json
import math
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from fuzzing import package
from fuzzing.kind import OUTSIDE, Kind, decoded, lines_of, same
from fuzzing.mutations import SECRET, damage_bytes, damage_file, damage_json, damage_lines

_LOOKED_AT = 10**8  # bytes of a file; those with holes have more
REPORTED = 0.04  # of the inputs, whose report is written too: its plots take most of a second

RESULTS = {
    "student": {
        "1": {"score": 0.4375, "tasks": {"count": 0.25, "color": 0.625}},
        "2": {"score": 0.75, "tasks": {"count": 0.5, "color": 1.0}},
    },
    "teacher": {
        "score": 0.875,
        "tasks": {"count": 0.75, "color": 1.0},
        "nfe": 50,
        "few": {"4": {"score": 0.5, "tasks": {"count": 0.25, "color": 0.75}}},
    },
}
_FITTING = ("student", "teacher", "score", "tasks", "nfe", "few", "1", "2", "01", "4", "1e3", 0.25)
_FITTING += ("9" * 5000, "10000000000", 4.7, 2.0, "٣", {"score": 0.5}, {"score": 1, "tasks": {}})


def _outside(root: Path) -> None:
    (root / OUTSIDE).mkdir()
    (root / OUTSIDE / "secret.txt").write_text(SECRET)


def _lines(count: int) -> str:
    lines = [
        {"step": 10 * i, "loss": 2.0 / i, "examples_per_sec": 1000.0 + i, "time": 1.5 * i, "a": 3}
        for i in range(1, count + 1)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def _make_workdir(root: Path) -> None:
    _outside(root)
    folder = root / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(RESULTS, indent=2))
    (folder / "metrics.jsonl").write_text(_lines(6))
    (folder / "config.json").write_text(json.dumps({"name": "a", "total_steps": 60, "b": [1, {}]}))
    Image.new("RGB", (8, 8), "red").save(folder / "samples" / "final.png")


def _reported(folder: Path) -> str:
    """Faults of the page of a workdir."""
    page = package.report(folder).read_text()
    if "<script>FUZZ" in page or SECRET in page:
        return "the report has raw tags, or a file of another folder"
    return ""


# Results


def _damage_results(rng: Random, folder: Path) -> None:
    name = rng.choice((*["results.json"] * 20, "config.json", "samples/final.png"))
    damage_file(rng, folder / name, lambda rng, content: _json(rng, content, name, _FITTING))


def _json(rng: Random, content: bytes, name: str, values: tuple) -> bytes:
    if name.endswith(".png"):
        return damage_bytes(rng, content)
    return damage_json(rng, content, values)


def _read_results(rng: Random, folder: Path) -> Any:
    results = package.read_scores(folder)
    return results, _reported(folder) if rng.random() < REPORTED else ""


def _scores(table: Any, name: str) -> dict:
    """The contents of a table of scores: (score, tasks) by steps."""
    found = {}
    for steps, content in table.items():
        found[int(steps)] = _score(content)
        if str(int(steps)) != steps or int(steps) < 1:
            raise ValueError(f"{name}: steps {steps!r}")
    return found


def _score(content: dict) -> tuple:
    tasks = {name: _number(x) for name, x in content.get("tasks", {}).items()}
    return _number(content["score"]), tasks


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _differs_results(value: Any, folder: Path, base: Path) -> str:
    results, wrong = value
    path = folder / "results.json"
    if wrong or not path.exists():
        return wrong or ("results of no file" if results is not None else "")
    try:
        content = json.loads(decoded(path.read_bytes()))
        teacher = content.get("teacher")
        said = {
            "student": _scores(content.get("student", {}), "student"),
            "few": _scores(teacher.get("few", {}), "few") if "teacher" in content else {},
            "teacher": _score(teacher) if "teacher" in content else None,
            "nfe": teacher.get("nfe") if "teacher" in content else None,
        }
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        return f"read what holds no scores: {type(error).__name__}"
    found = {
        "student": {k: tuple(v) for k, v in results.student.items()},
        "few": {k: tuple(v) for k, v in results.few.items()},
        "teacher": results.teacher and tuple(results.teacher),
        "nfe": results.nfe,
    }
    for key in said:
        if key == "nfe" and said[key] == found[key] and type(said[key]) is not bool:
            continue
        if not same(said[key], found[key]):
            return f"{key} is read as something else"
    return ""


# Metrics


def _damage_metrics(rng: Random, folder: Path) -> None:
    fitting = ("step", "loss", "time", 10, 20, 30, 1e9, 2.5, -1, float("nan"), True, "7")
    damage_file(
        rng, folder / "metrics.jsonl", lambda rng, content: damage_lines(rng, content, fitting)
    )


def _read_metrics(rng: Random, folder: Path) -> Any:
    metrics = package.read_log(folder)
    return metrics, _reported(folder) if rng.random() < REPORTED else ""


def _said_metrics(content: bytes) -> tuple[dict[int, dict], bool]:
    """Lines by step, and whether all of the file's lines are good ones."""
    text, by_step, good = decoded(content), {}, True
    if text is None:
        text, good = content.decode(errors="surrogateescape"), False
    for line in lines_of(text):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            step = values["step"]
            if type(step) not in (int, float) or step != int(step):
                raise ValueError
            numbers = {k: float(x) for k, x in values.items() if type(x) in (int, float)}
            by_step.setdefault(int(step), []).append(numbers)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            good = False
    return by_step, good


def _differs_metrics(value: Any, folder: Path, base: Path) -> str:
    metrics, wrong = value
    path = folder / "metrics.jsonl"
    if wrong:
        return wrong
    said, good = {}, True
    if path.exists():
        with path.open("rb") as file:
            content = file.read(_LOOKED_AT)
        whole = path.stat().st_size <= _LOOKED_AT
        said, good = _said_metrics(content if whole else content.rstrip(b"\0"))
        good = good and whole
    found = {int(line["step"]): line for line in metrics.lines} if metrics else {}
    for step, line in found.items():
        if not any(same(line, one) for one in said.get(step, ())):
            return "a line is read as something else"
    if good and metrics and not metrics.unreadable and said.keys() != found.keys():
        return "lines are left out, and none is counted"
    return ""


# Configurations


def _make_configs(root: Path) -> None:
    _outside(root)
    files = {"scm": ("smoke", "flux_lite", "lora"), "teacher": ("",), "imm": ("smoke",)}
    files |= {"meanflow": ("smoke",), "autoencoder": ("",)}
    for name, presets in files.items():
        path = package.ROOT / "configs" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for preset in presets:
            package.save_config(module.get_config(preset), root / f"{name}_{preset}")


def _damage_config(rng: Random, folder: Path) -> None:
    fitting = ("scm", "flow_matching", "imm", "flux", "shapes", "adamw", "muon", "bfloat16", "int8")
    fitting += ("name", "objective", "model", "data", "optimizer", [512, 512], [1, 2], 64, 0.5)
    fitting += ("xla", "blocked", "full", "(", "[", "blocks/", 7, 3, {"name": "scm"}, "cosine")
    damage_file(
        rng, folder / "config.json", lambda rng, content: damage_json(rng, content, fitting)
    )


def _differs_config(value: Any, folder: Path, base: Path) -> str:
    text = decoded((folder / "config.json").read_bytes())
    try:
        said = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return "read what is no JSON"
    return _differs_settings(value.to_dict(), said, package.default_settings())


def _differs_settings(found: Any, said: Any, defaults: Any, name: str = "") -> str:
    """Compares settings; those that an older version's file lacks have their defaults."""
    if not isinstance(found, dict) or not isinstance(said, dict):
        return "" if same(found, said) else f"{name} is read as something else"
    for key in sorted(said.keys() | found.keys()):
        default = defaults.get(key) if isinstance(defaults, dict) else None
        if key not in found:
            return f"{name}{key} is left out"
        if key not in said and not same(found[key], default):
            return f"{name}{key} is made up"
        if key in said:
            wrong = _differs_settings(found[key], said[key], default, f"{name}{key}.")
            if wrong:
                return wrong
    return ""


KINDS = {
    "configs": Kind(
        0.15,
        _make_configs,
        _damage_config,
        lambda rng, folder: package.read_config(folder),
        _differs_config,
    ),
    "results": Kind(0.14, _make_workdir, _damage_results, _read_results, _differs_results),
    "metrics": Kind(0.13, _make_workdir, _damage_metrics, _read_metrics, _differs_metrics),
}
