"""Does a run fit a topology, and how long does a step take there?"""

import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jax_distill.assembly import stages
from jax_distill.config import ConfigError
from jax_distill.devices import sharding
from jax_distill.objectives.methods import FROM_SCRATCH
from jax_distill.planning import chips, collectives, embedding, formulas, program
from jax_distill.planning.chips import GIB, Topology
from jax_distill.planning.embedding import Embedding
from jax_distill.planning.program import Program
from jax_distill.planning.roofline import Roofline, roofline, utilisation

SWEPT_TENSOR = (1, 2, 4)
SWEPT_BATCH = (1, 2, 4)  # examples a chip
SWEPT_REMAT = ("none", "dots", "full")


class Arithmetic(NamedTuple):
    """Exact operations of the matrix products, of all chips together.

    Attributes:
      flops: of the program.
      needed: the same without what is computed twice to save memory.
      forward: of one evaluation of the student's network for the batch.
    """

    flops: int
    needed: int
    forward: int


def count(planned: Program, plain: Callable[[], Program] | None) -> Arithmetic:
    """Counts a program, and the same without rematerialisation, None where it has none."""
    flops = planned.flops()
    needed = flops if plain is None else plain().flops()
    return Arithmetic(flops, needed, program.forward_flops(planned.config))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Needs of a program on a topology.

    Attributes:
      stage: of the run, with the players of a turn where there are several; or "sampling".
      topology: the chips.
      compiled: whether a compiler said so; otherwise by formula.
      changes: of the configuration, as flags, without which it would not run there.
      mesh: sizes of the axes.
      batch_size: examples a step, of all chips together.
      remat: of the network.
      held: bytes on a chip by kind, of what the program is given.
      temporaries: bytes on a chip that the program needs beside that.
      peak: bytes on a chip at most.
      hbm: bytes that a chip has for programs.
      arithmetic: operations a step, of all chips together.
      exchanges: by kind, number and bytes on a chip.
      roofline: seconds by part.
      total_steps: of the run; None for a sampler.
      compile_seconds: time that the compiler took.
      mean_step_seconds: over all turns of the stage, as often as each comes.
      others: plans of the run's other stages and turns, which need no more memory.
      embedding: of the captions of each batch, before its step; None where they come embedded.
    """

    stage: str
    topology: Topology
    compiled: bool
    changes: tuple[str, ...]
    mesh: Mapping[str, int]
    batch_size: int
    remat: str
    held: Mapping[str, int]
    temporaries: int
    peak: int
    hbm: int
    arithmetic: Arithmetic
    exchanges: Mapping[str, Mapping[str, int]]
    roofline: Roofline
    total_steps: int | None
    compile_seconds: float
    mean_step_seconds: float = math.nan
    others: tuple["Plan", ...] = ()
    embedding: Embedding | None = None

    @property
    def fits(self) -> bool:
        return self.peak <= self.hbm

    @property
    def name(self) -> str:
        """Of the stage, without the players whose turn it is."""
        return self.stage.partition(",")[0]

    @property
    def step_seconds(self) -> float:
        """With the captions' time, whose program is another: neither waits for the host."""
        captions = self.embedding.roofline.seconds if self.embedding else 0.0
        return self.roofline.seconds + captions

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: nothing that is computed twice counts."""
        return utilisation(self.topology, self.arithmetic.needed, self.step_seconds)

    @property
    def examples_per_second(self) -> float:
        return self.batch_size / self.step_seconds

    @property
    def hours(self) -> float | None:
        """Of all steps of the run."""
        return None if self.total_steps is None else self.total_steps * self.step_seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "stage": self.stage,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "mesh": dict(self.mesh),
            "batch_size": self.batch_size,
            "remat": self.remat,
            "changes": list(self.changes),
            "compiled": self.compiled,
            "compile_seconds": round(self.compile_seconds, 1),
            "hbm_gib": self.hbm / GIB,
            "peak_gib": self.peak / GIB,
            "fits": self.fits,
            "held_gib": {kind: size / GIB for kind, size in self.held.items()},
            "temporaries_gib": self.temporaries / GIB,
            "flops_per_step": self.arithmetic.flops,
            "forwards_per_step": self.arithmetic.flops / self.arithmetic.forward,
            "collectives": {kind: dict(entry) for kind, entry in self.exchanges.items()},
            "roofline_seconds": dataclasses.asdict(self.roofline),
            "step_seconds": self.step_seconds,
            "mean_step_seconds": self.mean_step_seconds,
            "bound": self.roofline.bound,
            "text_encoders": self.embedding.to_dict() if self.embedding else None,
            "mfu": self.mfu,
            "hfu": utilisation(self.topology, self.arithmetic.flops, self.step_seconds),
            "examples_per_second": self.examples_per_second,
            "total_steps": self.total_steps,
            "hours": self.hours,
            "others": [plan.to_dict() for plan in self.others],
        }


def make_plan(
    config: ConfigDict,
    topology: Topology,
    *,
    sample: bool = False,
    compiled: bool = True,
    effort: float = 0.0,
    counted: Callable[[Program, Callable[[], Program] | None], Arithmetic] = count,
) -> Plan:
    """Plans the steps of a run, stage by stage, or its sampler.

    Args:
      config: of the run.
      topology: the chips; those of GPUs are always planned by formula.
      sample: the sampler in place of the steps.
      compiled: False for formulas alone.
      effort: of the TPU compiler, from -1, quick, to 0, as for a run; see `measure`.
      counted: counts the operations.

    Returns:
      The plan of the stage that needs the most memory; the others are in it.

    Raises:
      ConfigError: the configuration does not fit the topology's number of chips, or has no step.
    """
    compiled = compiled and topology.kind != "gpu"

    def measured(planned: Program, by: Any = formulas) -> Measured:
        if compiled:
            return measure(planned, topology, effort, by=by)
        return estimate(planned, topology, by)

    by_batch: dict[int, Embedding | None] = {}  # stages of equal batches share it
    plans = []
    for planned, plain, changes in _programs(config, topology, sample=sample, compiled=compiled):
        begin = time.monotonic()
        needs = measured(planned)
        seconds = time.monotonic() - begin
        arithmetic = counted(planned, plain)
        batch_size = planned.config.batch_size
        if not sample and batch_size not in by_batch:
            by = functools.partial(measured, by=embedding)
            by_batch[batch_size] = embedding.plan(planned.config, planned.mesh, topology, by)
        captions = by_batch.get(batch_size)
        held, peak = planned.bytes_by_kind(), needs.peak
        if captions is not None:
            peak = max(needs.peak + captions.held, captions.peak + sum(held.values()))
            held[embedding.KIND] = captions.held
        plans.append(
            Plan(
                stage=planned.name,
                topology=topology,
                compiled=compiled,
                changes=changes,
                mesh=dict(planned.mesh.shape),
                batch_size=batch_size,
                remat=planned.config.model.remat,
                held=held,
                temporaries=needs.temporaries,
                peak=peak,
                hbm=needs.hbm,
                arithmetic=arithmetic,
                exchanges=collectives.totals(needs.exchanges),
                roofline=roofline(topology, arithmetic.flops, needs.hbm_bytes, needs.exchanges),
                total_steps=planned.steps or None,
                compile_seconds=seconds if compiled else 0.0,
                embedding=captions,
            )
        )
    plans = [
        dataclasses.replace(plan, mean_step_seconds=_mean_step_seconds(plans, plan.name))
        for plan in plans
    ]
    largest = max(reversed(plans), key=lambda plan: plan.peak)
    others = tuple(plan for plan in plans if plan is not largest)
    return dataclasses.replace(largest, others=others)


def _mean_step_seconds(plans: Sequence[Plan], stage: str) -> float:
    """Over the turns of a stage, as often as each comes."""
    turns = [(plan.total_steps or 1, plan.step_seconds) for plan in plans if plan.name == stage]
    return sum(count * seconds for count, seconds in turns) / sum(count for count, _ in turns)


def _programs(
    config: ConfigDict, topology: Topology, *, sample: bool, compiled: bool
) -> Iterator[tuple[Program, Callable[[], Program] | None, tuple[str, ...]]]:
    """Of each stage the program, what makes it without its rematerialisation, `divisible`'s flags.

    Of a sampler's run, the last stage alone.
    """
    config, changes = divisible(config, topology.chips)
    every = program.run_stages(config)
    for stage in every[-1:] if sample else every:
        if compiled:
            devices = jax.devices()[:1] if topology.kind == "cpu" else chips.tpu_devices(topology)
            mesh = program.make_mesh(stage.config, devices)
        else:
            mesh = formulas.abstract_mesh(sharding.mesh_shape(config.mesh, topology.chips))
            program.check_batch(stage.config, mesh)
        if sample:
            yield program.sampling(stage, mesh), None, changes
            continue
        unsaved = stage._replace(config=_changed(stage.config, {"model.remat": "none"}))
        for planned in program.training(stage, mesh):
            plain = functools.partial(_of_turn, unsaved, mesh, planned.name)
            yield planned, None if stage.config.model.remat == "none" else plain, changes


def _of_turn(stage: stages.Stage, mesh: Any, name: str) -> Program:
    """The program of a stage's turn, by its name."""
    return next(found for found in program.training(stage, mesh) if found.name == name)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes of a program on one chip, by a compiler or a formula."""

    temporaries: int
    peak: int
    hbm: int
    hbm_bytes: int
    exchanges: tuple[collectives.Collective, ...]


def estimate(planned: Program, topology: Topology, by: Any = formulas) -> Measured:
    """Estimates a program by formula, without a compiler; the module `by` has the formulas."""
    held, temporaries = sum(planned.bytes_by_kind().values()), by.temporaries(planned)
    return Measured(
        temporaries,
        held + temporaries,
        topology.chip.hbm,
        by.hbm_bytes(planned),
        tuple(by.exchanges(planned)),
    )


def measure(
    planned: Program, topology: Topology, effort: float = 0.0, by: Any = formulas
) -> Measured:
    """Compiles, and reads the compiler's account of memory and exchanges.

    Args:
      planned: the program.
      topology: that its mesh is of.
      effort: of the TPU compiler; at -1 it takes a quarter of the time, and its program, which is
        scheduled in another way than a run's, about as much memory.
      by: the module of formulas, for what a compiler does not say.
    """
    options = {"exec_time_optimization_effort": effort} if topology.kind == "tpu" else None
    try:
        compiled = planned.jitted.lower(*planned.arguments).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT])i?B? of ([\d.]+)([KMGT])i?B? hbm", str(error))
        if used is None:
            raise
        peak, hbm = (_size(*used.groups()[at : at + 2]) for at in (0, 2))
        held = sum(planned.bytes_by_kind().values())
        exchanges, moved = by.exchanges(planned), by.hbm_bytes(planned)
        return Measured(peak - held, peak, hbm, moved, tuple(exchanges))
    memory = compiled.memory_analysis()
    exchanges = collectives.collectives(compiled.as_text(), topology.chips)
    return Measured(
        memory.temp_size_in_bytes,
        peak_bytes(memory),
        topology.chip.hbm,
        by.hbm_bytes(planned),
        tuple(exchanges),
    )


def peak_bytes(memory: Any) -> int:
    """Bytes that a compiled program needs: arguments, results that are not theirs, the rest."""
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return (
        kept
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def divisible(config: ConfigDict, count: int) -> tuple[ConfigDict, tuple[str, ...]]:
    """The configuration, with the smallest `mesh.tensor` by which its batch divides among chips.

    Returns:
      The configuration and the flags that say what was changed.
    """
    if config.mesh.fsdp != -1 or config.mesh.tensor != 1 or config.mesh.data < 1:
        return config, ()
    micro = config.batch_size // config.accumulate
    if config.objective.name not in FROM_SCRATCH and config.rescale.total_steps:
        micro = math.gcd(micro, config.rescale.batch_size // config.accumulate)
    groups = math.gcd(micro, count)
    tensor = count // groups
    if tensor == 1:
        return config, ()
    changed = _changed(config, {"mesh.tensor": tensor})
    return changed, (f"--config.mesh.tensor={tensor}",)


def smallest_change(
    config: ConfigDict, plan: Plan, *, sample: bool = False, effort: float = 0.0
) -> tuple[str, Plan] | None:
    """The smallest change by which a plan that does not fit does, tried from small to large.

    Returns:
      Its flags and its plan; None where none of those tried is enough.
    """
    for changes, topology in _remedies(config, plan):
        candidate = _changed(config, changes)
        words = [f"--config.{key}={value}" for key, value in changes.items()]
        if topology is not plan.topology:
            words.append(f"--topology={topology.name}")
        try:
            programs = list(_programs(candidate, topology, sample=sample, compiled=False))
        except ValueError:
            continue  # it does not divide
        peaks = [estimate(rough, topology).peak for rough, *_ in programs]
        if max(peaks) <= topology.chip.hbm:
            options = {"sample": sample, "compiled": plan.compiled, "effort": effort}
            found = make_plan(candidate, topology, **options)
            if found.fits:
                return " ".join(words), found
    return None


def _remedies(config: ConfigDict, plan: Plan) -> Iterator[tuple[dict[str, Any], Topology]]:
    """Changes that the configuration takes as flags, from small to large."""
    remat = {"model.remat": "full"} if plan.remat != "full" and "remat" in config.model else {}
    if remat:
        yield remat, plan.topology
    groups = plan.mesh["data"] * plan.mesh["fsdp"]
    accumulate = 2 * config.accumulate
    batches = [config.batch_size]
    if any(other.name != plan.name for other in plan.others):  # of the rescale stage
        batches.append(config.rescale.batch_size)
    while all(size % (accumulate * groups) == 0 for size in batches):
        yield {"accumulate": accumulate} | remat, plan.topology
        accumulate *= 2
    if config.ema_dtype == "float32":
        halved = {"optimizer.moments": "bfloat16", "ema_dtype": "bfloat16"}
        yield halved | remat | {"accumulate": accumulate // 2}, plan.topology
    larger = plan.topology
    for _ in range(8):
        axis = min(range(len(larger.shape)), key=lambda axis: (larger.shape[axis], -axis))
        shape = tuple(n * 2 if at == axis else n for at, n in enumerate(larger.shape))
        if larger.kind == "cpu":
            return
        separator = "x" if larger.kind == "gpu" else ":"
        name = larger.name.rpartition(separator)[0] + separator + "x".join(map(str, shape))
        larger = dataclasses.replace(larger, name=name, shape=shape)
        yield dict(remat), larger


def sweep(config: ConfigDict, topology: Topology, *, sample: bool = False) -> list[Plan]:
    """Plans by formula over mesh shapes, batch a chip and remat; those that fit, fastest first.

    Of several stages the last, what the run is for.

    Raises:
      ConfigError: no candidate divides among the chips.
    """
    known: dict[tuple, tuple[int, Arithmetic]] = {}  # counted once: the mesh does not change it

    def counted(planned: Program, plain: Callable[[], Program] | None) -> Arithmetic:
        key, batch = (planned.name, planned.config.model.remat), planned.config.batch_size
        if key not in known:
            known[key] = batch, count(planned, plain)
        of, arithmetic = known[key]
        return Arithmetic(*(operations * batch // of for operations in arithmetic))

    plans = []
    for tensor, batch, remat in itertools.product(SWEPT_TENSOR, SWEPT_BATCH, SWEPT_REMAT):
        changes = {
            "mesh.data": 1,
            "mesh.fsdp": -1,
            "mesh.tensor": tensor,
            "batch_size": batch * topology.chips,
            "rescale.batch_size": batch * topology.chips,
            "accumulate": 1,
            "model.remat": remat,
        }
        if topology.chips % tensor:
            continue
        candidate = _changed(config, changes)
        options = {"sample": sample, "compiled": False, "counted": counted}
        try:
            plan = make_plan(candidate, topology, **options)
        except ConfigError:
            continue  # it does not divide
        names = (config.objective.name, "sampling")
        of_stage = (found for found in (plan, *plan.others) if found.name in names)
        plans.append(max(of_stage, key=lambda found: found.peak))
    if not plans:
        raise ConfigError(
            f"--sweep: no mesh of {topology.name} divides the batches that were tried; ask for one"
            " plan without --sweep"
        )
    return sorted(plans, key=lambda x: (not x.fits, x.mean_step_seconds / x.batch_size))


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            (changed[section] if section else changed)[name] = value
    return changed


def _size(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))
