"""Score: `python -m jax_distill.evaluate --checkpoint=DIR --steps=1,2,4 [--output=FILE]`.

Diversity and distances are measured too, beside real pictures' (`docs/measures.md`).
"""

from absl import flags
from ml_collections import ConfigDict

from jax_distill import pipeline, streams
from jax_distill.assembly import build, draw_settings
from jax_distill.assembly.resolution import EMBEDDED
from jax_distill.devices import processes
from jax_distill.evaluation import report, scoring
from jax_distill.runs import commands
from jax_distill.storage.files import write_json
from jax_distill.storage.outputs import check_output

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", EMBEDDED, "Workdir of a run, or 'embedded' for the bundled teacher."
)
_STEPS = flags.DEFINE_list("steps", ["1", "2", "4"], "Numbers of sampling steps to score.")
_OUTPUT = flags.DEFINE_string("output", None, "File to write; default: print only.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", 0, streams.MOST_SEED)
_PROMPTS = flags.DEFINE_integer("prompts", 600, "How many of the 600 held-out prompts.")
_DIVERSITY = flags.DEFINE_integer(
    "diversity_prompts", 30, "Of how many prompts diversity is measured; 0: measure nothing.", 0
)
_PICTURES = flags.DEFINE_integer("diversity_pictures", 8, "Of each of these prompts.", 2)
_TEACHER = flags.DEFINE_string(
    "teacher", None, "Its teacher, which is drawn and measured too: as --checkpoint."
)
_TEACHER_STEPS = flags.DEFINE_integer("teacher_steps", 50, "Of the teacher.", 1)
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; default: the configuration's.")
processes.define_flags()


def main(argv: list[str]) -> None:
    del argv
    try:
        steps = [int(text) for text in _STEPS.value]
    except ValueError:
        raise ValueError(f"--steps: {','.join(_STEPS.value)} are not whole numbers") from None
    if not steps:
        raise ValueError("--steps: none given; give numbers of steps such as --steps=1,2,4")
    for count in steps:
        draw_settings.steps(count)
    draw_settings.steps(_TEACHER_STEPS.value)
    prompts = scoring.held_out(_PROMPTS.value)
    if _DIVERSITY.value:
        scoring.held_out(_DIVERSITY.value, "diversity_prompts")
    processes.join()
    if _OUTPUT.value is not None and processes.is_leader():
        check_output(_OUTPUT.value)
    pipe = pipeline.load(_CHECKPOINT.value)
    teacher = None if _TEACHER.value is None else pipeline.load(_TEACHER.value)
    for flag, source, each in (("checkpoint", _CHECKPOINT, pipe), ("teacher", _TEACHER, teacher)):
        if each is not None and not each.world.scored:
            raise ValueError(
                f"--{flag}: pictures of '{source.value}', of world={each.config.world!r}, are"
                " not scored; draw them with python -m jax_distill.sample"
            )
    for count in steps:
        draw_settings.steps(count, pipe.config)
    draw_settings.guidance(_GUIDANCE.value, pipe.config)
    kind = "teacher" if pipe.config.objective.name in build.TEACHERS else "student"
    if kind == "teacher" and teacher is not None:
        raise ValueError(
            f"--teacher: '{_CHECKPOINT.value}' is a teacher itself; leave --teacher out"
        )
    scores = scoring.score(pipe, steps, prompts, seed=_SEED.value, guidance=_GUIDANCE.value)
    layout = scoring.results(
        **{kind: scores},
        measured=_measured(pipe, teacher, kind, steps) if _DIVERSITY.value else None,
        config=pipe.config,
        seed=_SEED.value,
    )
    if not processes.is_leader():
        return
    for count, entry in scores.items():
        tasks = "  ".join(f"{task} {value:.2f}" for task, value in entry["tasks"].items())
        print(f"{count:>3} steps  score {entry['score']:.3f}  {tasks}")
    if measures := report.format_measures(layout):
        print(f"\n{measures}")
    if _OUTPUT.value is not None:
        write_json(_OUTPUT.value, layout)


def _measured(
    pipe: pipeline.Pipeline, teacher: pipeline.Pipeline | None, kind: str, steps: list[int]
) -> dict:
    """Measures of a network, a teacher at the most steps alone, of real pictures and `teacher`."""
    settings = ConfigDict({"prompts": _PROMPTS.value, "diversity_prompts": _DIVERSITY.value})
    settings.diversity_pictures = _PICTURES.value
    yardstick = scoring.yardstick_of(pipe, settings, _SEED.value, _GUIDANCE.value)
    found: dict = {"real": yardstick.real()._asdict()}
    if kind == "teacher":
        return {
            **found,
            "nfe": max(steps),
            "teacher": yardstick.network(pipe, max(steps))._asdict(),
        }
    if teacher is not None:
        found["nfe"] = _TEACHER_STEPS.value
        yardstick.draw_teacher(teacher, _TEACHER_STEPS.value)
        found["teacher"] = yardstick.teacher(teacher, _TEACHER_STEPS.value)._asdict()
    return {**found, "student": scoring.measured(yardstick, pipe, steps)}


if __name__ == "__main__":
    commands.run(main)
