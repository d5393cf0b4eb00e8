"""Arrays that a run keeps alive on each device while it trains, stage by stage, against its plan.

python benchmarks/live_arrays.py [--devices=8] [--kinds=full,lora,int8,rescaled]

Runs both stages of a small sCM student of the bundled teacher in bfloat16, on CPU devices, and
counts the bytes of all live arrays on the first of them: at most within each stage, and while its
steps run, which is what `plan` says of parameters, optimizer, average, teacher and batch. The last
line is JSON; `ratio` is the largest of live over planned bytes.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--devices", type=int, default=8)
arguments.add_argument("--kinds", default="full,rescaled,lora,int8")
FLAGS = arguments.parse_args()
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={FLAGS.devices}"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "configs")]

import jax  # noqa: E402
import scm  # noqa: E402

from jax_distill.runs import experiment  # noqa: E402
from jax_distill.training import loop  # noqa: E402

KINDS = {
    "full": ("", {}),
    "rescaled": ("", {"teacher.velocity": "rescaled"}),
    "lora": ("lora", {}),
    "int8": ("lora", {"lora.base": "int8"}),
}
LOOKING = threading.Lock()
SMALL = {
    "dtype": "bfloat16",
    "total_steps": 3,
    "batch_size": 16,
    "rescale.total_steps": 3,
    "rescale.batch_size": 16,
    "data.examples": 64,
    "optimizer.name": "adamw",
    "samples.prompts": 1,
    "samples.teacher_steps": 1,
}


def configuration(kind: str):
    """The configuration of a small run."""
    preset, changes = KINDS[kind]
    config = scm.get_config(preset)
    with config.unlocked():
        for key, value in (SMALL | changes).items():
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
    return config


def live_bytes() -> int:
    """Bytes of the live arrays on the first device, each buffer once.

    One look at a time: looking keeps arrays alive.
    """
    with LOOKING:
        return _live_bytes()


def _live_bytes() -> int:
    first, sizes = jax.devices()[0], {}
    for array in jax.live_arrays():
        if array.is_deleted() or first not in array.sharding.device_set:
            continue
        part = next(shard.data for shard in array.addressable_shards if shard.device == first)
        pointer = part.unsafe_buffer_pointer()
        sizes[pointer] = max(sizes.get(pointer, 0), part.nbytes)
    return sum(sizes.values())


class Watch:
    """Looks at the live arrays all the time, and notes the most there were."""

    def __enter__(self) -> "Watch":
        self.most, self._stopped = 0, False
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stopped:
            try:
                self.most = max(self.most, live_bytes())
            except RuntimeError:  # an array went while it was looked at
                pass
            time.sleep(0.002)

    def __exit__(self, *exception) -> None:
        self._stopped = True
        self._thread.join()


def measure(kind: str, workdir: Path) -> dict[str, dict[str, int]]:
    """Live bytes by stage: "steps", while steps run, and "most"."""
    measured: dict[str, dict[str, int]] = {}
    jit_step, fit = loop.jit_step, loop.fit

    def watched_fit(config, *args, **kwargs):
        name = "time_rescale" if config.objective.name == "time_rescale" else "student"
        stage = measured[name] = {"before": live_bytes(), "steps": 0, "most": 0}

        def watched_step(*args):
            compiled = jit_step(*args)

            def step(state, frozen, batch):
                stage["steps"] = max(stage["steps"], live_bytes())
                return compiled(state, frozen, batch)

            return step

        loop.jit_step = watched_step
        with Watch() as watch:
            result = fit(config, *args, **kwargs)
        stage["most"] = watch.most
        return result

    loop.fit = watched_fit
    experiment.previews.previewer = lambda *args: lambda *args: None
    experiment.conclude = lambda *args, **kwargs: None
    experiment.rescaled_networks.compare = lambda *args: {"refitted": {}}
    experiment.previews.reference_row = lambda *args: lambda: None
    try:
        experiment.run(configuration(kind), workdir)
    finally:
        loop.jit_step, loop.fit = jit_step, fit
    return measured


def planned(kind: str) -> dict[str, int]:
    """Bytes on a device by stage, as `plan` has them: of all that a step is given."""
    from jax_distill.planning import formulas, program

    mesh = formulas.abstract_mesh((1, FLAGS.devices, 1))
    sizes = {}
    for stage in program.run_stages(configuration(kind)):
        held = next(program.training(stage, mesh)).bytes_by_kind()
        sizes["time_rescale" if stage.name == "time_rescale" else "student"] = sum(held.values())
    return sizes


def main() -> None:
    rows = {}
    for kind in FLAGS.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows[kind] = measure(kind, Path(folder) / "run")
        if hasattr(experiment, "stages"):
            for stage, size in planned(kind).items():
                rows[kind][stage]["planned"] = size
        print(kind, json.dumps(rows[kind]), flush=True)
    ratios = [
        stage["steps"] / stage["planned"]
        for stages in rows.values()
        for stage in stages.values()
        if "planned" in stage
    ]
    print(
        json.dumps({"benchmark": "live_arrays", "ratio": max(ratios, default=None), "rows": rows})
    )


if __name__ == "__main__":
    main()
