"""Port: `python -m jax_distill.port --source=FLUX_DIR --output=DIR`, PyTorch weights to ours."""

from absl import flags

from jax_distill.assembly import build
from jax_distill.interop.tensors import CHOICES
from jax_distill.models.sizes import LONGEST
from jax_distill.runs import commands
from jax_distill.runs.port_settings import Flags
from jax_distill.runs.porting import port
from jax_distill.storage import paths

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Folder that diffusers can load, or its id on the hub; a transformer alone: its folder, a"
    " student of T2I-Distill (.pt), or a safetensors file with BFL's or diffusers' names.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to make.")
_DTYPE = flags.DEFINE_enum("dtype", "keep", list(CHOICES), "Of the parameters on disk.")
_BASE = flags.DEFINE_string(
    "base",
    "",
    "For a transformer alone: the ported folder that has the text encoders and the autoencoder.",
)
_VARIANT = flags.DEFINE_string(
    "variant", "", "Of the weights in a folder, such as fp16; default: the plain or the only ones."
)
flags.DEFINE_integer(
    "text_length",
    None,
    "Tokens of T5's sequences: 256 (default) for FLUX.1-lite and schnell, 512 for dev.",
    lower_bound=2,
    upper_bound=LONGEST,
)
flags.DEFINE_enum(
    "objective",
    "",
    ["", *build.OBJECTIVES],
    "Method that the network was trained by; default: what its files say.",
)
flags.DEFINE_float(
    "time_scale",
    None,
    "Factor of t before the network embeds it, where its files do not say: 1000 for"
    " FLUX, 1 for T2I-Distill.",
)
flags.DEFINE_float(
    "guidance_factor", None, "Likewise the guidance scale: 1000 for FLUX, 1 for T2I-Distill."
)
flags.DEFINE_string(
    "shift",
    "",
    "Of the schedule of a transformer alone: base (that of --base), dynamic (FLUX.1-dev's) or a"
    " number (1: FLUX.1-schnell's).",
)
flags.DEFINE_enum(
    "guidance",
    "auto",
    list(build.GUIDANCE),
    "How a teacher is guided; cfg: by classifier-free guidance, for networks that have no input for"
    " the guidance scale and were not distilled to do without it.",
)


def main(argv: list[str]) -> None:
    del argv
    output = paths.path(_OUTPUT.value)
    port(
        _SOURCE.value,
        output,
        dtype=_DTYPE.value,
        base=_BASE.value,
        variant=_VARIANT.value,
        **{name: flags.FLAGS[name].value for name in Flags._fields},
    )
    print(f"wrote {output}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["source", "output"])
    commands.run(main)
