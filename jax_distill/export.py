"""Export: `python -m jax_distill.export --checkpoint=DIR --output=DIR`, our weights to PyTorch."""

from absl import flags

from jax_distill.interop.layouts import LAYOUTS
from jax_distill.interop.tensors import CHOICES
from jax_distill.runs import commands
from jax_distill.runs.exporting import export
from jax_distill.storage import paths

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Workdir of a run, a folder of jax_distill.port, or 'embedded' for the bundled teacher.",
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "diffusers",
    list(LAYOUTS),
    "A diffusers folder; T2I-Distill's .pt file; one safetensors file; or the adapters of a LoRA"
    " student in diffusers' layout.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to make.")
_TIME_SCALE = flags.DEFINE_float(
    "time_scale",
    None,
    "Refit the time embedders so that the network embeds this many t. Default: what the format's"
    " readers embed, 1000 t in stock diffusers and t in T2I-Distill; else the network's own.",
    lower_bound=1e-3,
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "keep",
    list(CHOICES),
    "Type of the network's tensors; embedders of time, guidance and interval are not narrowed.",
)


def main(argv: list[str]) -> None:
    del argv
    output = paths.path(_OUTPUT.value)
    export(
        _CHECKPOINT.value,
        output,
        layout=_FORMAT.value,
        scale=_TIME_SCALE.value,
        dtype=_DTYPE.value,
    )
    print(f"wrote {output}; its README.md says how to draw with it")


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "output"])
    commands.run(main)
