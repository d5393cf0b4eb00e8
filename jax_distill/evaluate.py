"""Score and draw benchmarks. There are three ways:

python -m jax_distill.evaluate --checkpoint=DIR --steps=1,2,4 [--output=FILE]
    scores, diversity and distances in the shapes world (`docs/measures.md`)
python -m jax_distill.evaluate --checkpoint=DIR --benchmark=geneval --prompts_file=FILE \\
  --steps=2 --output=DIR
    draws a benchmark's pictures into a folder; stopped by whatever, it goes on with the same
    command, and several processes share the work
python -m jax_distill.evaluate --judge=DIR,DIR [--detector=MODEL] [--clip=MODEL] [--output=FILE]
    scores such folders, the teacher's and the student's (`docs/benchmarks.md`)
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from jax_distill import pipeline, streams
from jax_distill.assembly import build, draw_settings
from jax_distill.assembly.resolution import EMBEDDED
from jax_distill.devices import processes
from jax_distill.evaluation import report, scoring
from jax_distill.evaluation.benchmarks import drawn
from jax_distill.runs import benchmarking, commands
from jax_distill.storage import paths
from jax_distill.storage.files import write_json
from jax_distill.storage.outputs import check_output

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", EMBEDDED, "Workdir of a run, folder of jax_distill.port, or 'embedded'."
)
_STEPS = flags.DEFINE_list("steps", ["1", "2", "4"], "Numbers of sampling steps to score.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "File to write, default: print only; with --benchmark the folder to draw into."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", 0, streams.MOST_SEED)
_PROMPTS = flags.DEFINE_integer("prompts", 600, "How many of the 600 held-out prompts.")
_DIVERSITY = flags.DEFINE_integer(
    "diversity_prompts", 30, "Of how many prompts diversity is measured; 0: measure nothing.", 0
)
_DIVERSE = flags.DEFINE_integer("diversity_pictures", 8, "Of each of these prompts.", 2)
_TEACHER = flags.DEFINE_string(
    "teacher", None, "Its teacher, which is drawn and measured too: as --checkpoint."
)
_TEACHER_STEPS = flags.DEFINE_integer("teacher_steps", 50, "Of the teacher.", 1)
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; default: the configuration's.")
_BENCHMARK = flags.DEFINE_enum(
    "benchmark", None, list(drawn.BENCHMARKS), "Draws its pictures into the folder --output."
)
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    "GenEval's evaluation_metadata.jsonl, DPG-Bench's dpg_bench.csv, or a text file with a prompt a"
    " line; 'bundled' for a few prompts in either benchmark's format.",
)
_PICTURES = flags.DEFINE_integer(
    "pictures",
    None,
    "Of each prompt, for --benchmark; default: 4, and 1 of plain prompts.",
    1,
    drawn.MOST_PICTURES,
)
_HEIGHT = flags.DEFINE_integer("height", None, "Pixels, for --benchmark; default: the run's.", 1)
_WIDTH = flags.DEFINE_integer("width", None, "Pixels, for --benchmark; default: the run's.", 1)
_TILE = flags.DEFINE_integer("tile", None, "As of jax_distill.sample, for --benchmark.", 1)
_JUDGE = flags.DEFINE_list("judge", [], "Folders that --benchmark drew, of the same prompts.")
_DETECTIONS = flags.DEFINE_list(
    "detections", [], "GenEval's files, one a folder; default: detections.jsonl in each."
)
_ANSWERS = flags.DEFINE_list(
    "answers", [], "DPG-Bench's files, one a folder; default: answers.jsonl in each."
)
_DETECTOR = flags.DEFINE_string(
    "detector", None, "Folder of a detector, ONNX or transformers, that makes detections.jsonl."
)
_CLIP = flags.DEFINE_string(
    "clip", None, "Folder of a CLIP, likewise: names colours, and gives CLIP scores."
)
_REAL = flags.DEFINE_string("real", None, "Folder of real pictures for CMMD, with --clip.")
processes.define_flags()

_DRAWING = ("prompts_file", "pictures", "height", "width", "tile")
_JUDGING = ("detections", "answers", "detector", "clip", "real")
_SCORING = ("prompts", "diversity_prompts", "diversity_pictures", "teacher", "teacher_steps")


def main(argv: list[str]) -> None:
    del argv
    _check_flags()
    if _JUDGE.value:
        _judge()
    elif _BENCHMARK.value:
        _draw()
    else:
        _score()


def _check_flags() -> None:
    """Raises ValueError for flags that do not go together."""

    def given(*names: str) -> str | None:
        return next((name for name in names if flags.FLAGS[name].present), None)

    if not _BENCHMARK.value and (flag := given(*_DRAWING)):
        raise ValueError(f"--{flag} needs --benchmark, whose pictures are drawn")
    if not _JUDGE.value and (flag := given(*_JUDGING)):
        raise ValueError(f"--{flag} needs --judge, the folders that are scored")
    drawing = ("checkpoint", "steps", "seed", "guidance", "benchmark")
    if _JUDGE.value and (flag := given(*drawing, *_SCORING)):
        raise ValueError(f"--{flag}: the folders of --judge are drawn already; leave it out")
    if _BENCHMARK.value and (flag := given(*_SCORING)):
        raise ValueError(f"--{flag} is of scores in the shapes world; leave it or --benchmark out")
    if _REAL.value and not _CLIP.value:
        raise ValueError("--real needs --clip, which CMMD compares pictures by")


def _steps() -> list[int]:
    try:
        steps = [int(text) for text in _STEPS.value]
    except ValueError:
        raise ValueError(f"--steps: {','.join(_STEPS.value)} are not whole numbers") from None
    if not steps:
        raise ValueError("--steps: none given; give numbers of steps such as --steps=1,2,4")
    for count in steps:
        draw_settings.steps(count)
    return steps


def _judge() -> None:
    """Scores folders of pictures."""
    if _OUTPUT.value is not None:
        check_output(_OUTPUT.value, (".json",))
    findings = benchmarking.Findings(
        tuple(map(paths.path, _DETECTIONS.value)),
        tuple(map(paths.path, _ANSWERS.value)),
        _DETECTOR.value and Path(_DETECTOR.value),
        _CLIP.value and Path(_CLIP.value),
        _REAL.value and Path(_REAL.value),
    )
    layout = benchmarking.judge([paths.path(name) for name in _JUDGE.value], findings)
    lines = [] if _OUTPUT.value is None else benchmarking.write(paths.path(_OUTPUT.value), layout)
    for line in (report.format_benchmark(layout), *lines):
        print(line)


def _draw() -> None:
    """Draws a benchmark's pictures."""
    steps = _steps()
    if len(steps) > 1:
        raise ValueError("--steps: give one number with --benchmark, and another --output for each")
    if not _OUTPUT.value:
        raise ValueError("--output is missing; name the folder to draw into: --output=drawn")
    if not _PROMPTS_FILE.value:
        raise ValueError(
            "--prompts_file is missing; give the benchmark's file, or 'bundled' for a few prompts"
        )
    output = paths.path(_OUTPUT.value)
    asked = benchmarking.read_asked(_BENCHMARK.value, _PROMPTS_FILE.value)
    pictures = _PICTURES.value or (1 if _BENCHMARK.value == "prompts" else 4)
    processes.join()
    asking = benchmarking.Asking(
        pictures, steps[0], _SEED.value, _GUIDANCE.value, _HEIGHT.value, _WIDTH.value, _TILE.value
    )
    there = benchmarking.draw(_CHECKPOINT.value, asked, output, asking)
    if processes.is_leader():
        print(f"drew {there} pictures of {len(asked.captions)} prompts into {output}")


def _score() -> None:
    """Scores a network of the shapes world."""
    steps = _steps()
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
                f"--{flag}: pictures of '{source.value}', of world={each.config.world!r}, have no"
                " judge of their own; draw those of a benchmark with --benchmark=geneval, then"
                " score them with --judge"
            )
    for count in steps:
        draw_settings.steps(count, pipe.config)
    draw_settings.guidance(_GUIDANCE.value, pipe.config)
    kind = build.role(pipe.config)
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
    settings.diversity_pictures = _DIVERSE.value
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
