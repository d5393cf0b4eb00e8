"""Draw: `python -m jax_distill.sample --checkpoint=DIR --prompt="..." [--steps=2] [--seed=0]`."""

from absl import flags

from jax_distill import pipeline, streams
from jax_distill.assembly import draw_settings
from jax_distill.assembly.resolution import EMBEDDED
from jax_distill.devices import processes
from jax_distill.evaluation import png
from jax_distill.runs import commands, program_cache
from jax_distill.storage import paths
from jax_distill.storage.outputs import check_output

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    EMBEDDED,
    "Workdir of a run, folder of jax_distill.port, or 'embedded' for the bundled teacher.",
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Caption; give it again for more pictures.")
_STEPS = flags.DEFINE_integer("steps", 2, "Sampling steps: 1, 2 or 4; 28 for FLUX itself.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", 0, streams.MOST_SEED)
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale; default: the configuration's.")
_HEIGHT = flags.DEFINE_integer("height", None, "Pixels, a multiple of 16; default: the run's.", 1)
_WIDTH = flags.DEFINE_integer("width", None, "Pixels, a multiple of 16; default: the run's.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Pictures drawn at a time.", 1)
_TILE = flags.DEFINE_integer(
    "tile", None, "Decode in overlapping tiles of so many pixels, to save memory; 1024 for FLUX.", 1
)
_OUTPUT = flags.DEFINE_string("output", "out.png", "PNG: the picture, or a grid of several.")
processes.define_flags()
program_cache.define_flag()


def main(argv: list[str]) -> None:
    del argv
    if not _PROMPT.value:
        raise ValueError('--prompt is missing; say what to draw, such as --prompt="a red circle"')
    draw_settings.captions(_PROMPT.value)
    draw_settings.steps(_STEPS.value)
    processes.join()
    output = paths.path(_OUTPUT.value)
    if processes.is_leader():
        check_output(_OUTPUT.value, png.ENDINGS)
    program_cache.use()
    pipe = pipeline.load(_CHECKPOINT.value)
    pictures = pipe(
        _PROMPT.value,
        steps=_STEPS.value,
        seed=_SEED.value,
        guidance=_GUIDANCE.value,
        batch_size=_BATCH_SIZE.value,
        height=_HEIGHT.value,
        width=_WIDTH.value,
        tile=_TILE.value,
    )
    if processes.is_leader():
        if len(pictures) == 1:
            png.save(output, pictures[0])
        else:
            from jax_distill.evaluation import grids  # and matplotlib, which takes its time

            grids.save_pictures(output, pictures, _PROMPT.value)
        print(f"wrote {output}")


if __name__ == "__main__":
    commands.run(main)
