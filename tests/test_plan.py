"""Plans say what the compiler and the shapes say."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.ad_checkpoint import saved_residuals
from ml_collections import ConfigDict
from tiny_runs import settings

from jax_distill import worlds
from jax_distill.assembly import build
from jax_distill.config import ConfigError
from jax_distill.devices import sharding
from jax_distill.flow import Batch
from jax_distill.models import mmdit
from jax_distill.planning import chips, formulas, planner, program, table
from jax_distill.planning.collectives import collectives, totals
from jax_distill.training.step import init_state, jit_step, make_optimizers

CONFIGS = Path(__file__).parents[1] / "configs"
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


def preset(name: str) -> ConfigDict:
    file, _, which = name.partition(":")
    spec = importlib.util.spec_from_file_location(file, CONFIGS / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(which)


def tiny(**model) -> ConfigDict:
    config = settings(build.objective_settings("flow_matching"), **model)
    with config.unlocked():
        config.batch_size = 4
    return config


def test_memory_is_that_of_the_real_program():
    config = tiny()
    objective = build.objective(config)
    optimizers = make_optimizers(objective, config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    shapes = jax.eval_shape(lambda: build.initial_parameters(config))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    state = init_state(objective, optimizers, params, config.seed)
    places = sharding.shard_state(state, mesh)
    state = jax.device_put(state, places)
    null = worlds.of(config).null
    frozen = jax.device_put({"null": null}, sharding.shard_state({"null": null}, mesh))
    text = jax.tree.map(lambda leaf: jnp.repeat(leaf, 4, axis=0), null)
    batch = sharding.shard_batch(Batch(jnp.zeros((4, *build.token_shape(config))), text), mesh)
    step = jit_step(objective, optimizers, config, places)
    memory = step.lower(state, frozen, batch).compile().memory_analysis()

    plan = planner.make_plan(config, chips.parse("cpu"))
    assert plan.temporaries == memory.temp_size_in_bytes
    assert plan.peak == planner.peak_bytes(memory)
    assert sum(plan.held.values()) + 12 == memory.argument_size_in_bytes  # and three counters
    assert plan.fits and plan.compiled
    assert "fits" in table.describe(plan)


@pytest.mark.slow
def test_arithmetic_is_that_of_an_unrolled_program(monkeypatch):
    """Of a wide model, in which what is not a product is next to nothing."""
    wide = {"attention_head_dim": 512, "axes_dims_rope": (128, 192, 192), "num_single_layers": 1}
    config = tiny(**wide)
    with config.unlocked():
        config.batch_size = 64
    mesh = program.make_mesh(config, jax.devices()[:1])
    planned = next(program.training(program.run_stages(config)[0], mesh))
    counted = planned.flops()

    def unrolled(body, carry, stacked):
        for layer in range(jax.tree.leaves(stacked)[0].shape[0]):
            carry, _ = body(carry, jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked))
        return carry, None

    monkeypatch.setattr(mmdit.jax.lax, "scan", unrolled)
    analysis = (
        next(program.training(program.run_stages(config)[0], mesh))
        .jitted.lower(*planned.arguments)
        .compile()
    )
    assert counted == pytest.approx(analysis.cost_analysis()["flops"], rel=0.02)


def test_the_8b_step_is_counted_in_forwards_and_planned_without_a_compiler():
    plan = planner.make_plan(preset("scm:flux_lite"), chips.parse("gpu:h200x8"))
    # Teacher, student, tangent, gradient (two), and the student again: it is rematerialised.
    flops, needed, forward = plan.arithmetic
    assert flops / forward == pytest.approx(1 + 1 + 1 + 2 + 1, rel=0.05)
    assert needed / forward == pytest.approx(1 + 1 + 1 + 2, rel=0.05)
    assert plan.held["parameters"] == pytest.approx(4 * 8.16e9 / 8, rel=0.02)
    assert plan.held["teacher"] == pytest.approx(2 * 8.16e9 / 8, rel=0.02)
    assert plan.held["optimizer"] == pytest.approx(2 * plan.held["parameters"], rel=0.01)
    assert plan.fits and 0 < plan.mfu < 1
    values = plan.to_dict()
    assert values["examples_per_second"] == pytest.approx(64 / values["step_seconds"])


@pytest.mark.parametrize("remat", formulas.SAVED_WIDTHS)
def test_the_formulas_know_what_each_remat_policy_saves(remat):
    """Of FLUX.1-lite's blocks, by token: the difference of two sizes of pictures."""
    config = worlds.of(preset("scm:flux_lite")).planned_teacher()
    params = jax.eval_shape(lambda: build.initial_parameters(config))
    saved, tokens = [], []
    for size in (512, 1024):
        with config.unlocked():
            config.data.resolution, config.dtype = (size, size), "bfloat16"
            config.model.remat, config.model.attention = remat, "blocked"
        network, like = build.network(config), program.text_like(config, 1)
        shape = build.token_shape(config)

        def loss(params, network=network, like=like, shape=shape):
            text = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), like)
            x, one = jnp.ones((1, *shape)), jnp.ones(1)
            return network.velocity(params, x, one, text, one).sum()

        found = [x for x, why in saved_residuals(loss, params) if "argument" not in why]
        saved.append(sum(x.size * x.dtype.itemsize for x in found))
        tokens.append(shape[0] + config.data.text_length)
    model = build.network_config(config)
    units = model.hidden_size * formulas.COMPUTE_BYTES * (tokens[1] - tokens[0])
    widths = (saved[1] - saved[0]) / units / (model.num_layers + model.num_single_layers)
    assert widths == pytest.approx(formulas.SAVED_WIDTHS[remat], rel=0.15)


def a_byte_short(plan: planner.Plan) -> planner.Plan:
    """The same plan on a chip with a byte less than its peak."""
    chip = dataclasses.replace(plan.topology.chip, hbm=plan.peak - 1)
    topology = dataclasses.replace(plan.topology, chip=chip)
    return dataclasses.replace(plan, topology=topology, hbm=chip.hbm)


def test_what_does_not_fit_says_what_does():
    roomy = chips.parse("gpu:h200x1")
    plan = a_byte_short(planner.make_plan(tiny(), roomy))
    assert not plan.fits
    words, changed = planner.smallest_change(tiny(), plan)
    assert changed.fits and words == "--config.model.remat=full"
    # The last before more chips: moments and average in bfloat16.
    smallest = tiny()
    with smallest.unlocked():
        smallest.model.remat, smallest.accumulate = "full", smallest.batch_size
    plan = a_byte_short(planner.make_plan(smallest, roomy))
    words, changed = planner.smallest_change(smallest, plan)
    assert changed.fits and "--config.optimizer.moments=bfloat16 --config.ema_dtype" in words
    assert changed.held["optimizer"] < 0.6 * changed.held["parameters"] * 2


def by_stage(plan: planner.Plan) -> dict[str, planner.Plan]:
    return {found.stage: found for found in (plan, *plan.others)}


def test_every_stage_is_planned_with_its_own_memory():
    config = preset("scm")
    with config.unlocked():
        config.optimizer.moments = config.ema_dtype = "bfloat16"
    config.optimizer.name = "adamw"
    plan = planner.make_plan(config, chips.parse("gpu:h200x8"))
    stages = by_stage(plan)
    assert stages.keys() == {"time_rescale", "scm"}
    assert plan.peak == max(found.peak for found in stages.values())
    for found in stages.values():
        assert found.held["optimizer"] < 1.1 * found.held["parameters"]  # two halves
    assert stages["scm"].held["EMA"] < 0.6 * stages["scm"].held["parameters"]
    assert stages["time_rescale"].held["EMA"] == stages["time_rescale"].held["parameters"]
    assert stages["time_rescale"].total_steps == 150 and stages["scm"].total_steps == 600
    text = table.describe(plan)
    assert all(name in text for name in stages) and "hours" in text
    assert plan.to_dict()["others"][0]["stage"] in stages


def test_adapters_plan_the_base_that_they_are_beside():
    config = preset("scm:lora")
    topology = chips.parse("gpu:h200x8")
    wide = by_stage(planner.make_plan(config, topology))["scm"]
    with config.unlocked():
        config.lora.base, config.lora.targets = "int8", "single_blocks/"
    small = by_stage(planner.make_plan(config, topology))["scm"]
    assert small.held["teacher"] < 0.4 * wide.held["teacher"]  # int8 for float32, but for embedders
    assert small.held["parameters"] < wide.held["parameters"]  # fewer have adapters
    # All of the network is gathered, of which 2 % are trained.
    gathered = wide.exchanges["all-gather"]["bytes"]
    assert gathered > 0.9 * 3 * 2 * 5.1e6
    assert wide.exchanges["reduce-scatter"]["bytes"] < 0.1 * gathered
    sampled = planner.make_plan(config, topology, sample=True)
    assert sampled.held["parameters"] < 0.5 * wide.held["teacher"] + small.held["parameters"]


@pytest.mark.slow
def test_a_sweep_compares_the_students_stage():
    plans = planner.sweep(preset("scm"), chips.parse("gpu:h200x2"))
    assert {plan.stage for plan in plans} == {"scm"}
    assert {plan.batch_size for plan in plans} == {2, 4, 8}
    assert {plan.mesh["tensor"] for plan in plans} == {1, 2}
    assert all(plan.changes == () for plan in plans)


@pytest.mark.slow
def test_a_remedy_is_one_that_the_config_takes(tmp_path):
    config = preset("scm")
    plan = a_byte_short(planner.make_plan(config, chips.parse("gpu:h200x1")))
    words, _ = planner.smallest_change(config, plan)
    assert words == "--config.model.remat=full"
    command = [sys.executable, "-m", "jax_distill.plan", "--config=configs/scm.py", words]
    ran = subprocess.run(
        [*command, "--topology=gpu:h200x1"], cwd=CONFIGS.parent, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "remat full" in ran.stdout, ran.stderr


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [("total_steps", 0, "0 is not positive"), ("batch_size", -4, "-4 is not positive")],
)
def test_what_a_run_refuses_is_not_planned(key, value, error):
    config = tiny()
    with config.unlocked():
        config[key] = value
    with pytest.raises(ConfigError, match=f"^{key}: {error}"):
        planner.make_plan(config, chips.parse("gpu:h200x1"))


def test_the_tables_agree_with_their_headings():
    """Every line of docs/plans.md is of the topology and of stages that its command plans."""
    text = (CONFIGS.parent / "docs" / "plans.md").read_text()
    tables = text.split("<!-- tables -->")[1].split("<!-- end of tables -->")[0].split("### ")[1:]
    assert len(tables) >= 7
    for found in tables:
        heading, _, rest = found.partition("\n")
        name, resolution = re.match(r"`configs/(\S+)`, (\d+) px", heading).groups()
        assert f"--config=configs/{name} " in rest
        assert (f"resolution={resolution},{resolution}" in rest) == (resolution != "512")
        config = preset(name.replace(".py", ""))
        rows = [
            line.split(" | ") for line in rest.splitlines() if re.match(r"\| (v\d|  *\|)", line)
        ]
        stages = {row[1].partition(",")[0] for row in rows}
        lora = "lora" in name
        assert stages == {stage.name for stage in program.run_stages(config)}
        teachers = [float(row[5]) for row in rows if row[0].startswith("| v5p")]
        assert min(teachers) > (7.5 if lora else 0.2) and max(teachers) < (9 if lora else 0.3)


def test_a_batch_that_does_not_divide_splits_the_layers():
    changed, flags = planner.divisible(preset("scm:flux_lite"), 256)
    assert flags == ("--config.mesh.tensor=4",) and changed.mesh.tensor == 4
    assert planner.divisible(preset("scm:flux_lite"), 64)[1] == ()


HLO = """
%all-reduce-scatter (input: bf16[64,8]) -> bf16[16,8] {
  %all-reduce.2 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}
  ROOT %dynamic-slice.5 = bf16[16,8]{1,0} dynamic-slice(%all-reduce.2, %i, %c)
}

%body (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %all-gather.1 = bf16[64,8]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %scattered = bf16[16,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
}

%condition (p: (s32[], bf16[16,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(38)
}

ENTRY %main (a: bf16[16,8]) -> bf16[16,8] {
  %while.1 = (s32[], bf16[16,8]) while(%t), condition=%condition, body=%body
  %all-gather-start = (f32[4]{0}, f32[16]{0}) all-gather-start(%s), replica_groups=[1,4]<=[4]
  %all-gather-done = f32[16]{0} all-gather-done(%all-gather-start)
}
"""


@pytest.mark.parametrize("counter", ["s32", "u32"])
def test_exchanges_in_loops_count_every_time(counter):
    found = collectives(HLO.replace("s32", counter), 4)
    assert totals(found) == {
        "all-gather": {"count": 39, "bytes": 38 * 64 * 8 * 2 + 16 * 4},
        "reduce-scatter": {"count": 38, "bytes": 38 * 64 * 8 * 2},
    }
    looped = next(e for e in found if e.kind == "all-gather" and e.times == 38)
    assert looped.loops == 1 and looped.received == 38 * 64 * 8 * 2 * 3 / 4


def test_topologies():
    pod = chips.parse("v5p:4x4x4")
    assert (pod.chips, pod.chip.hbm) == (64, 95 * 2**30)
    assert pod.bandwidth(64) == 600e9  # six links, all rings
    assert chips.parse("v5e:8x8").bandwidth(64) == 100e9  # no ring: two links at a corner
    assert chips.parse("v5e:16x16").bandwidth(256) == 200e9
    for wrong in ("v5p", "v9:2x2", "gpu:h200", "gpu:h200x0", "v5e:0x2"):
        with pytest.raises(ConfigError, match="--topology: .* such as v5p:4x4x4"):
            chips.parse(wrong)


def test_without_the_tpu_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ConfigError, match=r"pip install jax\[tpu\]"):
        chips.tpu_devices(chips.parse("v5e:2x2"))


@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu, the TPU compiler, is not installed")
def test_a_tpu_plan_is_the_compilers():
    plan = planner.make_plan(tiny(), chips.parse("v5e:2x2"), effort=-1.0)
    assert plan.compiled and plan.fits and plan.exchanges
