"""Score: `python -m jax_distill.evaluate --checkpoint=DIR --steps=1,2,4 [--output=FILE]`."""

from pathlib import Path

from absl import flags

from jax_distill import pipeline, streams
from jax_distill.assembly import build, draw_settings
from jax_distill.assembly.resolution import EMBEDDED
from jax_distill.devices import processes
from jax_distill.evaluation import scoring
from jax_distill.runs import commands
from jax_distill.storage.files import check_output, write_json

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", EMBEDDED, "Workdir of a run, or 'embedded' for the bundled teacher."
)
_STEPS = flags.DEFINE_list("steps", ["1", "2", "4"], "Numbers of sampling steps to score.")
_OUTPUT = flags.DEFINE_string("output", None, "File to write; default: print only.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", 0, streams.MOST_SEED)
_PROMPTS = flags.DEFINE_integer("prompts", 600, "How many of the 600 held-out prompts.")
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
    prompts = scoring.held_out(_PROMPTS.value)
    processes.join()
    if _OUTPUT.value is not None and processes.is_leader():
        check_output(_OUTPUT.value)
    pipe = pipeline.load(_CHECKPOINT.value)
    if not pipe.world.scored:
        raise ValueError(
            f"--checkpoint: pictures of '{_CHECKPOINT.value}', of world={pipe.config.world!r}, are"
            " not scored; draw them with python -m jax_distill.sample"
        )
    draw_settings.guidance(_GUIDANCE.value, pipe.config)
    scores = scoring.score(pipe, steps, prompts, seed=_SEED.value, guidance=_GUIDANCE.value)
    if not processes.is_leader():
        return
    for count, entry in scores.items():
        tasks = "  ".join(f"{task} {value:.2f}" for task, value in entry["tasks"].items())
        print(f"{count:>3} steps  score {entry['score']:.3f}  {tasks}")
    if _OUTPUT.value is not None:
        kind = "teacher" if pipe.config.objective.name in build.TEACHERS else "student"
        layout = scoring.results(**{kind: scores}, config=pipe.config, seed=_SEED.value)
        write_json(Path(_OUTPUT.value), layout)


if __name__ == "__main__":
    commands.run(main)
