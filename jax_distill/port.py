"""Port: `python -m jax_distill.port --source=FLUX_DIR --output=DIR`, PyTorch weights to ours."""

from pathlib import Path

from absl import flags

from jax_distill import build, commands
from jax_distill.porting import DTYPES, port

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Folder that diffusers can load, or its id on the hub; a transformer alone: its folder, a"
    " student of T2I-Distill (.pt), or a safetensors file with BFL's or diffusers' names.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to make.")
_DTYPE = flags.DEFINE_enum("dtype", "keep", list(DTYPES), "Of the parameters on disk.")
_TEXT_LENGTH = flags.DEFINE_integer(
    "text_length",
    256,
    "Tokens of T5's sequences: 256 for FLUX.1-lite and schnell, 512 for dev.",
    lower_bound=2,
)
_BASE = flags.DEFINE_string(
    "base",
    "",
    "For a transformer alone: the ported folder that has the text encoders and the autoencoder.",
)
_OBJECTIVE = flags.DEFINE_enum(
    "objective", "", ["", *build.OBJECTIVES], "What the network was trained for; default: told."
)


def main(argv: list[str]) -> None:
    del argv
    output = Path(_OUTPUT.value)
    if _BASE.value and _TEXT_LENGTH.present:
        raise ValueError("--text_length: it is that of --base; leave it out")
    port(
        _SOURCE.value,
        output,
        dtype=_DTYPE.value,
        text_length=_TEXT_LENGTH.value,
        base=_BASE.value,
        objective=_OBJECTIVE.value,
    )
    print(f"wrote {output}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["source", "output"])
    commands.run(main)
