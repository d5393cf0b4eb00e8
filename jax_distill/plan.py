"""Does a run fit those chips, and how long does a step take? Answered without the chips.

python -m jax_distill.plan --config=configs/scm.py:flux_lite --topology=v5p:4x4x4
    [--json] [--sample] [--sweep] [--config.key=value ..]
"""

import json

from absl import flags
from ml_collections import ConfigDict

from jax_distill.planning import chips, evaluations, planner, table
from jax_distill.runs import commands, config_flag

_CONFIG = config_flag.define(
    "File of the configuration; --config.key=value changes one of its values."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The chips, such as v5e:8x8, v5p:4x4x4, v6e:8x8, gpu:h200x8 or cpu."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object, or a list of them for a sweep.")
_SAMPLE = flags.DEFINE_bool("sample", False, "Plan the student's sampler, not the training step.")
_SWEEP = flags.DEFINE_bool(
    "sweep", False, "Compare mesh shapes, batches a chip and remat, by formula."
)
_EFFORT = flags.DEFINE_float(
    "effort",
    -1.0,
    "Of the TPU compiler: -1 is quick, and schedules otherwise than for a run; 0 is as for a run.",
    lower_bound=-1.0,
    upper_bound=0.0,
)


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    if not isinstance(config, ConfigDict):
        raise ValueError("--config: missing; give a file such as configs/scm.py:flux_lite")
    if _TOPOLOGY.value is None:
        raise ValueError("--topology: missing; give one such as v5p:4x4x4, gpu:h200x8 or cpu")
    topology = chips.parse(_TOPOLOGY.value)
    if _SWEEP.value:
        plans = planner.sweep(config, topology, sample=_SAMPLE.value)
        listed = json.dumps([plan.to_dict() for plan in plans])
        print(listed if _JSON.value else table.compare(plans))
        return
    options = {"sample": _SAMPLE.value, "effort": _EFFORT.value}
    plan = planner.make_plan(config, topology, **options)
    change = None if plan.fits else planner.smallest_change(config, plan, **options)
    spent = {} if _SAMPLE.value else evaluations.summary(config)
    if _JSON.value:
        print(json.dumps({**plan.to_dict(), **spent, "change": change and change[0]}))
        return
    print(table.describe(plan))
    if spent:
        print(table.evaluations(**spent))
    if change is not None:
        flags_, changed = change
        print(f"\ndoes not fit; the smallest change that does is {flags_}:\n")
        print(table.describe(changed))
    elif not plan.fits:
        print("\ndoes not fit; no remat, accumulation or larger slice of this kind that was tried")


if __name__ == "__main__":
    commands.run(main)
