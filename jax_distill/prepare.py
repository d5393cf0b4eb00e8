"""Encode: `python -m jax_distill.prepare --output=DIR [--examples=N] [--seed=0]`, or, for FLUX,
`python -m jax_distill.prepare --checkpoint=PORTED --source=PICTURES --output=DIR [--height=512]`.

Pictures and their captions become a folder of latents, for `data.path`, so that training never
encodes and several runs share one folder: pictures of the shapes world, or a folder of pictures
with captions (see `data/folder.py`), whose captions are embedded too.
"""

from pathlib import Path

from absl import flags

from jax_distill import build, commands
from jax_distill.data import records
from jax_distill.data.encoding import encode_shapes
from jax_distill.worlds.flux import Flux, ported_config
from jax_distill.worlds.shapes import embedded_codec

_OUTPUT = flags.DEFINE_string("output", None, "Folder of the latents, not there yet.")
_EXAMPLES = flags.DEFINE_integer("examples", 12_800, "Pictures of the shapes world.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the shapes world's stream, or of sampled latents.", 0)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of jax_distill.port: FLUX's parts.")
_SOURCE = flags.DEFINE_string("source", None, "Folder of pictures with captions, for FLUX.")
_HEIGHT = flags.DEFINE_integer("height", 512, "Pixels that pictures are fitted to, for FLUX.", 1)
_WIDTH = flags.DEFINE_integer("width", 512, "Pixels that pictures are fitted to, for FLUX.", 1)
_LATENTS = flags.DEFINE_enum(
    "latents", "mean", ["mean", "sample"], "What is taken of the autoencoder's posterior."
)


def main(argv: list[str]) -> None:
    del argv
    if not _OUTPUT.value:
        raise ValueError("--output is missing; name the folder to write, such as --output=latents")
    output = Path(_OUTPUT.value)
    if (output / records.DESCRIPTION).exists():
        raise ValueError(f"--output: '{output}' is already prepared; give another folder")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: '{output}' is a file; give a folder")
    if bool(_CHECKPOINT.value) != bool(_SOURCE.value):
        raise ValueError("--checkpoint and --source go together: FLUX's parts, and your pictures")
    if _SOURCE.value:
        config = ported_config(Path(_CHECKPOINT.value))
        with config.unlocked():
            config.data.resolution = (_HEIGHT.value, _WIDTH.value)
        build.token_shape(config)  # raises where sizes are no multiples of 16
        seed = _SEED.value if _LATENTS.value == "sample" else None
        count = Flux(config).prepare(Path(_SOURCE.value), output, seed=seed)
    else:
        count = _EXAMPLES.value
        encode_shapes(output, count, _SEED.value, embedded_codec().encode)
    print(f"wrote {count} examples to {output}; train on them with --config.data.path={output}")


if __name__ == "__main__":
    commands.run(main)
