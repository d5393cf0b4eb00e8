"""The tables of docs/plans.md, made by the planner that `python -m jax_distill.plan` calls.

python benchmarks/plans.py [--cache=DIR] [--only=scm:flux_lite@512] [--write]

Each plan is kept in the cache as the JSON that the command prints with --json, and is not made
again. `--write` puts the tables, or those of `--only`, into docs/plans.md. All of it takes two
hours of a core, and the TPU compiler: pip install -e '.[tpu]'.
"""

import argparse
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jax_distill.planning import chips, planner

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "plans.md"
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"
PODS = ("v5p:4x4x4", "v5e:8x8", "v5e:16x16", "v6e:8x8")
SINGLE = ("v5p:1x1x1", "v6e:1x1", "v5e:2x2", "v5e:1x1")
OTHERS = ("rcm", "tdm", "sid", "ladd", "sprint")
EFFORT = -1.0


class Table(NamedTuple):
    """Plans of one configuration on several topologies."""

    preset: str
    resolution: int
    topologies: tuple[str, ...]
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.preset}@{self.resolution}"

    def flags(self) -> list[str]:
        file, _, preset = self.preset.partition(":")
        size = self.resolution
        return [
            f"--config=configs/{file}.py:{preset}",
            *([f"--config.data.resolution={size},{size}"] if size != 512 else []),
            *self.changes,
        ]

    def config(self) -> Any:
        file, _, preset = self.preset.partition(":")
        spec = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(preset)
        with config.unlocked():
            config.data.resolution = (self.resolution, self.resolution)
        return config


TABLES = (
    Table("scm:flux_lite", 512, PODS),
    Table("meanflow:flux_lite", 512, PODS),
    Table("scm:flux_lite_lora", 512, SINGLE),
    Table("scm:flux_lite", 1024, PODS),
    Table("meanflow:flux_lite", 1024, PODS),
    Table("dmd2:flux_lite", 512, ("v5p:4x4x4", "v5e:16x16", "v6e:8x8")),
    Table("dmd2:flux_lite_lora", 512, ("v5p:1x1x1", "v5e:2x4")),
    *(Table(f"{name}:flux_lite", 512, ("v5p:4x4x4",)) for name in OTHERS),
    *(Table(f"{name}:flux_lite_lora", 512, ("v5p:1x1x1",)) for name in OTHERS),
)


def remember_measurements() -> None:
    """Makes the planner compile like programs once: methods share the rescale stage."""
    measure, known = planner.measure, {}

    def remembered(planned, topology, effort=0.0, **options):
        text = planned.jitted.lower(*planned.arguments).as_text()
        key = topology.name, hashlib.sha256(text.encode()).hexdigest()
        if key not in known:
            known[key] = measure(planned, topology, effort, **options)
        return known[key]

    planner.measure = remembered


def make(table: Table, topology: str, cache: Path) -> dict:
    """One plan and the change that would make it fit, if it does not."""
    path = cache / f"{table.name}@{topology}.json".replace(":", "_")
    if path.exists():
        return json.loads(path.read_text())
    config, parsed = table.config(), chips.parse(topology)
    plan = planner.make_plan(config, parsed, effort=EFFORT)
    change = None if plan.fits else planner.smallest_change(config, plan, effort=EFFORT)
    made = plan.to_dict()
    if change is not None:
        made |= {"change": change[0], "changed_peak_gib": change[1].peak / chips.GIB}
    path.write_text(json.dumps(made))
    print(path.name, f"{made['peak_gib']:.2f} of {made['hbm_gib']:.2f} GiB", flush=True)
    return made


HEAD = (
    "| topology, mesh | stage | parameters | optimizer | EMA | teacher | temporaries | peak, GiB"
    " | s a step | bound by | MFU | hours |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def rows(made: dict) -> str:
    """The lines of a plan, the largest stage first."""
    mesh = "x".join(map(str, made["mesh"].values()))
    text = ""
    for index, stage in enumerate([made, *made["others"]]):
        where = f"{made['topology']}, {mesh}" if not index else ""
        kinds = ("parameters", "optimizer", "EMA", "teacher")  # of all players together
        held = " | ".join(
            f"{sum(x for name, x in stage['held_gib'].items() if name.endswith(kind)):.2f}"
            for kind in kinds
        )
        fits = "" if stage["fits"] else ", **does not fit**"
        text += (
            f"| {where} | {stage['stage']} | {held} | {stage['temporaries_gib']:.2f}"
            f" | {stage['peak_gib']:.2f} of {stage['hbm_gib']:.0f}{fits}"
            f" | {stage['step_seconds']:.3f} | {stage['bound']} | {stage['mfu']:.1%}"
            f" | {stage['hours']:.1f} |\n"
        )
    return text


def describe(table: Table, plans: list[dict]) -> str:
    """A table with its heading and its command."""
    first = plans[0]
    size = f"{table.resolution} px"
    text = f"### `configs/{table.preset.replace(':', '.py:')}`, {size}, batch"
    text += f" {first['batch_size']}, remat {first['remat']}\n\n"
    command = " ".join(["python -m jax_distill.plan", *table.flags(), "--effort=-1"])
    text += f"    {command} --topology=TOPOLOGY\n\n{HEAD}" + "".join(map(rows, plans)) + "\n"
    for made in plans:
        if made["changes"]:
            flags = " ".join(made["changes"])
            text += f"{made['topology']} is planned with `{flags}`: its batch does not divide"
            text += " otherwise.\n"
        if not made["fits"]:
            change = made.get("change")
            says = "nothing that was tried makes it fit"
            if change:
                says = f"with `{change}` it does, in {made['changed_peak_gib']:.2f} GiB"
            text += f"{made['topology']} does not fit; {says}.\n"
    return text.rstrip() + "\n\n"


def sections(page: str) -> dict[str, str]:
    """The tables of a page, by their headings."""
    texts = page.partition(BEGIN)[2].partition(END)[0].split("### ")[1:]
    return {text.partition("\n")[0]: f"### {text.rstrip()}\n\n" for text in texts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path("runs/plans"))
    parser.add_argument("--only", default="", help="names of tables, such as scm:flux_lite@512")
    parser.add_argument("--write", action="store_true", help="into docs/plans.md")
    flags = parser.parse_args()
    flags.cache.mkdir(parents=True, exist_ok=True)
    remember_measurements()
    page = PAGE.read_text()
    made, kept = "", sections(page)
    for table in TABLES:
        if flags.only and table.name not in flags.only.split(","):
            continue
        plans = [make(table, topology, flags.cache) for topology in table.topologies]
        made += describe(table, plans)
    if not flags.write:
        print(made)
        return
    kept |= sections(BEGIN + made + END)
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(before + BEGIN + "\n" + "".join(kept.values()) + END + after)


if __name__ == "__main__":
    main()
