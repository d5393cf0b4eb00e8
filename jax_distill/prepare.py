"""Encode pictures and captions into a folder of latents for `data.path`, so that training never
encodes and several runs can share one folder. There are three ways:

python -m jax_distill.prepare --output=DIR [--examples=N] [--seed=0]
    pictures of the shapes world
python -m jax_distill.prepare --checkpoint=PORTED --source=PICTURES --output=DIR [--height=512]
    your pictures with captions, of any kind in `data/sources/`, for FLUX; captions are embedded too
python -m jax_distill.prepare --teacher=DIR [--captions=FILE] --output=DIR [--steps=20]
    no pictures: latents that a teacher draws for captions, the shapes world's or your own

One that is stopped, by whatever, goes on with the same command. Several processes share the work,
each on its own devices, if they see one disk; they find each other as those of a run do.

python -m jax_distill.prepare --check=DIR
    reads a whole folder and compares its checksums
"""

import contextlib
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import flags

from jax_distill import config as configuration
from jax_distill import pipeline, streams, worlds
from jax_distill.assembly import build, draw_settings
from jax_distill.data import manifest, sizes
from jax_distill.data.drawing import DrawnLatents
from jax_distill.data.encoding import EncodedPictures, Work, make
from jax_distill.data.estimate import estimate
from jax_distill.data.sizes import make_each
from jax_distill.data.sources.opening import open_source
from jax_distill.data.sources.prompts import Prompts
from jax_distill.data.sources.source import USUAL, CaptionedSource, Columns
from jax_distill.devices import processes, sharding
from jax_distill.runs import commands
from jax_distill.runs.stored_network import weights_of
from jax_distill.storage import paths
from jax_distill.storage.files import FileError
from jax_distill.storage.outputs import made_in_tries
from jax_distill.storage.places import check_new_folder
from jax_distill.worlds.flux.world import ported_config

_OUTPUT = flags.DEFINE_string("output", None, "Folder of the latents, which must not exist yet.")
_EXAMPLES = flags.DEFINE_integer("examples", 12_800, "Examples of the shapes world.", 1)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the shapes world's stream, and of drawings.", 0, streams.MOST_SEED
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of jax_distill.port: FLUX's parts.")
_SOURCE = flags.DEFINE_multi_string(
    "source",
    None,
    "Captioned pictures, for FLUX: a folder of them, tars, parquet files, a folder that datasets"
    " saved, or tfds:NAME[:SPLIT]. Files may be a pattern, or the flag be repeated.",
)
_IMAGE_COLUMN = flags.DEFINE_string(
    "image_column", None, "Column of pictures in --source; default: image (tables: file_name)."
)
_CAPTION_COLUMN = flags.DEFINE_string(
    "caption_column", None, "Column of captions in --source, --captions; default: text, caption."
)
_DAMAGED = flags.DEFINE_enum(
    "damaged", "fail", ["fail", "skip"], "What is done about damaged examples of --source."
)
_DAMAGED_SHARE = flags.DEFINE_float(
    "damaged_share", 0.01, "Largest share of examples that --damaged=skip leaves out.", 0.0, 1.0
)
_HEIGHT = flags.DEFINE_integer(
    "height", None, "Pixels of FLUX's pictures; default: the checkpoint's.", 1
)
_WIDTH = flags.DEFINE_integer(
    "width", None, "Pixels of FLUX's pictures; default: the checkpoint's.", 1
)
_SIZES = flags.DEFINE_string(
    "sizes",
    None,
    "Heights and widths, such as 512x512,432x768: each picture goes to the one whose shape is"
    " nearest its own, and each size is a folder in --output.",
)
_LATENTS = flags.DEFINE_enum(
    "latents", "mean", ["mean", "sample"], "Part of the autoencoder's posterior to take."
)
_EMBED = flags.DEFINE_boolean(
    "embed", True, "Store FLUX's captions embedded; --embed=false: for data.embedding=training."
)
_TEACHER = flags.DEFINE_string(
    "teacher", None, "Draws the latents: a run's workdir, a ported folder, or 'embedded'."
)
_CAPTIONS = flags.DEFINE_string("captions", None, "File of captions, for --teacher.")
_STEPS = flags.DEFINE_integer("steps", 20, "Sampling steps of --teacher.", 1)
_GUIDANCE = flags.DEFINE_float("guidance", None, "Of --teacher; default: its configuration's.")
_PADDING = flags.DEFINE_enum(
    "padding",
    "shared",
    ["shared", "kept"],
    "What is stored of an embedded caption beyond its own tokens: that of the empty caption, once"
    " for all; or its own, which takes 2 MiB a caption.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Tell what it would take, by encoding a few examples; write nothing."
)
_CHECK = flags.DEFINE_string("check", None, "A folder that was made, to compare its checksums.")
processes.define_flags()


def main(argv: list[str]) -> None:
    del argv
    if _CHECK.value:
        check(paths.path(_CHECK.value))
        return
    check_flags()
    if not _DRY_RUN.value:
        output = new_output()
    processes.join()
    share = processes.share()
    if _DRY_RUN.value:
        for line in estimate(asked()).lines(share.count):
            print(line)
        return
    if not paths.is_bucket(output):
        with contextlib.suppress(OSError):
            output.rmdir()  # an empty one
    with made_in_tries(output, share) as unfinished:
        if _SIZES.value:
            work = functools.partial(pictures_of, opened())
            counts = make_each(unfinished, sized(), work, share)
        else:
            count = make(unfinished, asked(), share)
    if share.leads and _SIZES.value:
        tell_sizes({output / sizes.name(size): count for size, count in counts.items()})
    elif share.leads:
        print(f"wrote {count} examples to {output}; train on them with --config.data.path={output}")


def tell_sizes(counts: Mapping[Path, int]) -> None:
    """Prints what was made: folders and the numbers of their examples."""
    for folder, count in counts.items():
        print(f"wrote {count} examples to {folder}")
    path, weights = ",".join(map(str, counts)), ",".join(map(str, counts.values()))
    print(f"train on them with --config.data.path={path} --config.data.weights={weights}")


def new_output() -> Path:
    """The folder of --output; raises ValueError if it is missing or cannot be made there."""
    if not _OUTPUT.value:
        raise ValueError("--output is missing; name the folder to write, such as --output=latents")
    output = paths.path(_OUTPUT.value)
    check_new_folder(output)
    if not paths.is_bucket(output) and (output / manifest.DESCRIPTION).exists():
        raise ValueError(f"--output: '{output}' is already prepared; give another folder")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: '{output}' is a file; give a folder")
    return output


def check(folder: Path) -> None:
    """Compares the checksums of a folder.

    Raises:
      ValueError: a file is missing, or is not as it was written.
    """
    description = manifest.verify(folder)
    files = list(manifest.files_of(description))
    print(f"{folder}: {description['examples']} examples in {len(files)} files, as written")


def check_flags() -> None:
    """Raises ValueError for flags that do not go together."""
    if bool(_CHECKPOINT.value) != bool(_SOURCE.value):
        raise ValueError("--checkpoint and --source go together: FLUX's parts, and your pictures")
    if _TEACHER.value and _SOURCE.value:
        raise ValueError("--teacher draws for captions and --source has pictures; give one of them")
    for flag in ("captions", "steps", "guidance"):
        if flags.FLAGS[flag].present and not _TEACHER.value:
            raise ValueError(f"--{flag} needs --teacher, which draws")
    for flag in ("height", "width", "dry_run"):
        if flags.FLAGS[flag].present and _SIZES.value:
            raise ValueError(f"--{flag} is for pictures of one size; leave it or --sizes out")
    for flag in ("latents", "image_column", "damaged", "sizes"):
        if flags.FLAGS[flag].present and not _SOURCE.value:
            raise ValueError(f"--{flag} needs --source, whose pictures are encoded")
    if flags.FLAGS["caption_column"].present and not (_SOURCE.value or _CAPTIONS.value):
        raise ValueError("--caption_column needs --source or --captions, which have captions")
    if flags.FLAGS["damaged_share"].present and _DAMAGED.value != "skip":
        raise ValueError("--damaged_share needs --damaged=skip, which it limits")
    for flag in ("height", "width", "padding"):
        if flags.FLAGS[flag].present and not (_TEACHER.value or _SOURCE.value):
            what = "are embedded as they are read" if flag == "padding" else "have a size"
            raise ValueError(f"--{flag} needs --source or --teacher; the shapes world's {what}")
    if flags.FLAGS["embed"].present and not (_TEACHER.value or _SOURCE.value):
        raise ValueError("--embed needs --source or --teacher; rendered pictures have words alone")
    if flags.FLAGS["padding"].present and not _EMBED.value:
        raise ValueError("--padding is of embedded captions; leave it out with --embed=false")


def asked() -> Work:
    """The records that the flags ask for."""
    if _TEACHER.value:
        return drawings()
    if _SOURCE.value:
        return pictures_of(opened())
    config = configuration.base()
    with config.unlocked():
        config.data.examples, config.data.seed = _EXAMPLES.value, _SEED.value
    return worlds.of(config).work()


def opened() -> CaptionedSource:
    """The pictures of --source."""
    return open_source(_SOURCE.value, columns())


def pictures_of(source: CaptionedSource, size: tuple[int, int] | None = None) -> EncodedPictures:
    """The records of pictures that the flags ask for; of --height and --width by default."""
    config = ported_config(paths.path(_CHECKPOINT.value))
    with config.unlocked():
        config.data.resolution = size or resolution(config.data.resolution)
    seed = _SEED.value if _LATENTS.value == "sample" else None
    share = _DAMAGED_SHARE.value if _DAMAGED.value == "skip" else 0.0
    return worlds.of(config).work(
        source, seed=seed, damaged_share=share, padding=_PADDING.value, embed=_EMBED.value
    )


def sized() -> list[tuple[int, int]]:
    """The sizes of --sizes; raises ValueError if one is no multiple of 16."""
    return [draw_settings.resolution(*size, size) for size in sizes.parse(_SIZES.value)]


def columns() -> Columns:
    return Columns(_IMAGE_COLUMN.value, _CAPTION_COLUMN.value)


def resolution(default: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels; raises ValueError if they are no multiples of 16."""
    return draw_settings.resolution(_HEIGHT.value, _WIDTH.value, default)


def drawings() -> DrawnLatents:
    """The teacher's drawings."""
    mesh = sharding.local_mesh() if processes.joined() else None
    pipe = pipeline.load(_TEACHER.value, mesh=mesh)
    if (method := pipe.config.objective.name) not in build.TEACHERS:
        raise ValueError(f"--teacher: '{_TEACHER.value}' is a run of {method!r}, no teacher")
    draw_settings.steps(_STEPS.value)
    guidance = draw_settings.guidance(_GUIDANCE.value, pipe.config)
    size, steps, seed = resolution(pipe.world.resolution), _STEPS.value, _SEED.value
    shape = build.token_shape(pipe.config, size)
    if _CAPTIONS.value:
        keys, captions = read_captions(_CAPTIONS.value, columns())
    elif (captions := pipe.world.captions(_EXAMPLES.value, seed)) is None:
        raise ValueError("--captions is missing; give a file of captions")
    else:
        keys = [f"{seed}:{index}" for index in range(len(captions))]

    def drawn(text, start):
        rng = np.random.Generator(np.random.Philox(key=[seed, start]))
        noise = rng.standard_normal((len(text.pooled), *shape), np.float32)
        return pipe.latents(
            text, steps=steps, guidance=_GUIDANCE.value, resolution=size, noise=noise
        )

    def read():
        _ = pipe.params  # now, in all processes together
        return drawn

    text = pipe.world.stored_text(_PADDING.value) if _EMBED.value else None
    facts = {
        "world": worlds.name(pipe.config),
        "teacher": _TEACHER.value,
        "weights": weights_of(_TEACHER.value),
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "captions": hashlib.sha256(manifest.canonical([keys, captions])).hexdigest()[:32],
        "resolution": list(size),
        "latents": {"shape": list(shape), "type": "float16", "taken": "drawn"},
    }
    if text is not None:
        facts |= {"text": text.facts, "encoders": text.encoders}
    encoder = functools.cache(pipe.world.encoder)
    return DrawnLatents(keys, captions, read, lambda words: encoder()(words), text, facts)


def read_captions(path: str | Path, columns: Columns = USUAL) -> tuple[list[str], list[str]]:
    """The captions of a file, see `Prompts`: their keys, and their words.

    Raises:
      ValueError: the file is missing, is not text, or has no caption.
    """
    try:
        prompts = Prompts([paths.path(path)], columns)
    except FileNotFoundError:
        raise ValueError(f"--captions: '{path}' is missing") from None
    except (FileError, paths.NoBucket) as error:
        raise ValueError(f"--captions: {error}") from None
    found = [prompts[index] for index in range(len(prompts))]
    return [each.key for each in found], [each.caption for each in found]


if __name__ == "__main__":
    commands.run(main)
