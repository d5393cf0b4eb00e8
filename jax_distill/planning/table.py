"""Plans as text for people."""

from collections.abc import Sequence

from jax_distill.planning.chips import GIB
from jax_distill.planning.embedding import KIND
from jax_distill.planning.planner import Plan
from jax_distill.planning.roofline import utilisation

BOUNDS = {"compute": "compute", "hbm": "memory bandwidth", "ici": "the links between chips"}


def describe(plan: Plan) -> str:
    """A plan on a page."""
    lines = [_title(plan), ""]
    for kind, size in [*plan.held.items(), ("temporaries", plan.temporaries)]:
        lines.append(_row(kind, f"{size / GIB:9.2f} GiB"))
    verdict = "fits" if plan.fits else "does not fit"
    lines.append(_row("peak", f"{plan.peak / GIB:9.2f} GiB of {plan.hbm / GIB:.2f}: {verdict}"))
    lines.append("")
    flops, needed, forward = plan.arithmetic
    unit = "a step" if plan.total_steps else "a batch"
    arithmetic = f"{flops / 1e12:9.1f} TFLOP {unit}, {flops / forward:.2f} forwards"
    if needed != flops:
        arithmetic += f" ({needed / forward:.2f} without what is computed twice)"
    lines.append(_row("arithmetic", arithmetic))
    for kind, entry in plan.exchanges.items():
        words = f"{entry['bytes'] / GIB:9.2f} GiB a chip in {entry['count']}"
        lines.append(_row(kind, words))
    if plan.embedding is not None:
        lines.append(_row(KIND, _captions(plan)))
    lines.append("")
    parts = plan.roofline
    times = f"compute {parts.compute:.3f}, memory {parts.hbm:.3f}, links {parts.ici:.3f}"
    lines.append(_row("seconds", f"{times}; bound by {BOUNDS[parts.bound]}"))
    lines.append(_row("time", f"{plan.step_seconds:9.3f} s {unit}"))
    hfu = utilisation(plan.topology, flops, plan.step_seconds)
    lines.append(_row("MFU", f"{plan.mfu:9.1%} ({hfu:.1%} with what is computed twice)"))
    lines.append(_row("examples/s", f"{plan.examples_per_second:9.1f}"))
    if plan.hours is not None:
        lines.append(_row("stage", f"{plan.hours:9.1f} hours for {plan.total_steps} steps"))
    if plan.others:
        lines += ["", "the other programs"]
        lines += [_row(other.stage, _in_short(other)) for other in plan.others]
        hours = plan.hours + sum(other.hours for other in plan.others)
        lines.append(_row("run", f"{hours:9.1f} hours"))
    return "\n".join(lines)


def evaluations(evaluations_per_step: float, evaluations: float) -> str:
    """A line of what `evaluations.summary` gives."""
    words = f"{evaluations_per_step:9.0f} a step in the mean, {evaluations:.0f} the run"
    return _row("evaluations", words)


def _captions(plan: Plan) -> str:
    """The row of the text encoders, whose bytes stand above."""
    flops, parts = plan.embedding.flops, plan.embedding.roofline
    return (
        f"{flops / 1e12:9.1f} TFLOP a step ({flops / plan.arithmetic.flops:.1%} of the others),"
        f" {parts.seconds:.3f} s more; bound by {BOUNDS[parts.bound]}"
    )


def _in_short(plan: Plan) -> str:
    """A plan in a line."""
    return (
        f"{plan.peak / GIB:9.2f} GiB at most; {plan.step_seconds:.3f} s a step,"
        f" {plan.hours:.1f} hours for {plan.total_steps} steps"
    )


def compare(plans: Sequence[Plan]) -> str:
    """Plans of one program, a line each."""
    lines = [
        f"{'mesh':>10} {'batch':>6} {'remat':>5} {'peak GiB':>9} {'fits':>5} {'s/step':>8}"
        f" {'bound':>8} {'MFU':>6} {'ex./s':>8}"
    ]
    for plan in plans:
        lines.append(
            f"{_mesh(plan):>10} {plan.batch_size:>6} {plan.remat:>5} {plan.peak / GIB:>9.1f}"
            f" {'yes' if plan.fits else 'no':>5} {plan.step_seconds:>8.3f}"
            f" {plan.roofline.bound:>8} {plan.mfu:>6.1%} {plan.examples_per_second:>8.1f}"
        )
    return "\n".join(lines)


def _title(plan: Plan) -> str:
    count = plan.topology.chips
    title = f"{plan.stage} on {plan.topology.name}: {count} chip{'s' * (count > 1)}, "
    title += f"mesh {_mesh(plan)}"
    title += f" (data x fsdp x tensor), batch {plan.batch_size}, remat {plan.remat}"
    if plan.changes:
        title += f"\nwith {' '.join(plan.changes)}, since the batch does not divide otherwise"
    how = f"compiled in {plan.compile_seconds:.0f} s" if plan.compiled else "by formula"
    return f"{title}; {how}"


def _mesh(plan: Plan) -> str:
    return "x".join(map(str, plan.mesh.values()))


def _row(name: str, text: str) -> str:
    return f"{name:<20}{text}"
