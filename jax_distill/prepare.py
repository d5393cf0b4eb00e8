"""Encode: `python -m jax_distill.prepare --output=DIR [--examples=N] [--seed=0]`.

Pictures of the shapes world and their captions become a folder of latents, for `data.path`, so that
training never encodes and several runs share one folder.
"""

from pathlib import Path

from absl import flags

from jax_distill import build, commands
from jax_distill.data import records
from jax_distill.data.encoding import encode_shapes

_OUTPUT = flags.DEFINE_string("output", None, "Folder of the latents, not there yet.")
_EXAMPLES = flags.DEFINE_integer("examples", 12_800, "Pictures.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the shapes world's stream.", 0)


def main(argv: list[str]) -> None:
    del argv
    if not _OUTPUT.value:
        raise ValueError("--output is missing; name the folder to write, such as --output=latents")
    output = Path(_OUTPUT.value)
    if (output / records.DESCRIPTION).exists():
        raise ValueError(f"--output: '{output}' is already prepared; give another folder")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: '{output}' is a file; give a folder")
    encode_shapes(output, _EXAMPLES.value, _SEED.value, build.embedded_codec().encode)
    print(
        f"wrote {_EXAMPLES.value} examples to {output}; train on them with"
        f" --config.data.path={output}"
    )


if __name__ == "__main__":
    commands.run(main)
