"""The programs of a model card."""

import string
from collections.abc import Mapping, Sequence

from jax_distill.interop import flux_config
from jax_distill.interop.cards import schedules, snippets
from jax_distill.interop.cards.card import Card
from jax_distill.sampling import Angles, Listed
from jax_distill.storage.quoting import literal

TEACHER = "FLUX"
"""The folder of the teacher in programs, which the reader puts in."""


def program(card: Card) -> str:
    """Python that draws with the exported files, to be run beside them."""
    return _pipeline_program(card) if card.layout == "diffusers" else _own_program(card)


def _pipeline_program(card: Card) -> str:
    """Draws with diffusers' own pipeline, or with the folder's."""
    pipelines, options, head = "DiffusionPipeline", "", ""
    prompt = snippets.PROMPT_AWAY if card.guided else snippets.PROMPT
    if card.captions:
        head, options = snippets.PARTS_EXAMPLES, ", **parts"
        prompt = snippets.PROMPT_GUIDED if card.guided else snippets.PROMPT_EXAMPLES
    elif not card.has_text:
        pipelines, options = "DiffusionPipeline, FluxPipeline", ", **parts"
        head = snippets.PARTS_TEACHER
    if card.interval_embeds:
        options += ", trust_remote_code=True"
    # Parts of several types, as transformers reads them, do not go together.
    narrow = card.dtype.startswith("bfloat16") and (card.interval_embeds or not card.refits)
    dtype = "bfloat16" if narrow else "float32"
    pieces = {"head": head, "prompt": prompt}
    pieces |= {"pipelines": pipelines, "options": options, "dtype": dtype}
    return filled(_assembled(snippets.PIPELINE, pieces), card)


def _own_program(card: Card) -> str:
    """Makes the network itself, and walks the schedule."""
    head, load = snippets.HEAD, [snippets.STATE[card.layout]]
    if card.interval_embeds:
        head = head.replace("from safetensors", snippets.IMPORT_EMBEDDING + "from safetensors")
        load += [snippets.SECOND]
    load += [snippets.FROM_STATE]
    load += [snippets.ADAPTERS] if card.base else []
    if card.interval_embeds:
        load += [snippets.TWO_TIMES, snippets.USE_TWO_TIMES]
    interval = snippets.INTERVAL if card.interval_embeds else ""
    null = snippets.NULL if card.guided else ""
    pieces = [
        head,
        *load,
        snippets.REST,
        *([snippets.EXAMPLES] if card.captions else []),
        snippets.NETWORK,
        snippets.GUIDED if card.guided else snippets.PLAIN,
        snippets.DECODE,
        _assembled(snippets.DRAW, {"schedule": _schedule(card), "interval": interval}),
        snippets.DRAW_EXAMPLES
        if card.captions
        else _assembled(snippets.DRAW_PROMPT, {"null": null}),
    ]
    embeds = "None"
    if card.guidance_embeds:
        stock = card.guidance_factor == flux_config.GUIDANCE_FACTOR
        embeds = snippets.EMBEDS if stock else snippets.EMBEDS_SCALED
    text = _joined(pieces)
    if "load_file(" not in text:
        text = text.replace("from safetensors.torch import load_file\n", "")
    length = "t" if schedules.restarts(card) else "t - s"
    return filled(_assembled(text, {"guidance_input": embeds, "length": length}), card)


def _schedule(card: Card) -> str:
    """Makes the `sigmas` of any number of steps."""
    match card.sampler.schedule:
        case Angles():
            return snippets.EVEN + snippets.ANGLES_SCHEDULE
        case Listed():
            return snippets.LISTED_SCHEDULE
    return snippets.EVEN + (snippets.LATE_SCHEDULE if schedules.start(card) < 1 else "")


def _joined(pieces: Sequence[str]) -> str:
    """Pieces of Python, definitions set apart."""
    text = ""
    for piece in (piece.strip("\n") for piece in pieces):
        definition = piece.startswith(("def ", "class ", "@", "if "))
        if text:
            text += "\n\n\n" if definition or text.rpartition("\n")[2].startswith(" ") else "\n\n"
        text += piece
    return text + "\n"


def _assembled(text: str, pieces: Mapping[str, str]) -> str:
    """Python with pieces of this program's own in the places of their `$names`."""
    for name, piece in pieces.items():
        text = text.replace(f"${name}", piece)
    return text


def filled(text: str, card: Card) -> str:
    """Puts the card's values into Python: only finite numbers, and names of this program.

    Raises:
      ValueError: a value is not a number.
    """
    height, width = card.resolution
    numbers = {
        "height": height,
        "width": width,
        "patch": card.patch,
        "rows": height // card.patch,
        "columns": width // card.patch,
        "channels": card.channels,
        "time_scale": card.time_scale,
        "guidance_share": float(f"{card.guidance_factor / flux_config.GUIDANCE_FACTOR:g}"),
        "guidance": card.guidance,
        "steps": card.steps,
        "mu": schedules.mu(card),
        "shift": schedules.shift(card),
        "start": schedules.start(card),
        "text_length": card.text_length,
    }
    names = {
        "folder": "." if card.has_text else TEACHER,
        "teacher": TEACHER,
        "vae": 'FOLDER / "vae"' if card.has_autoencoder else f'"{TEACHER}", subfolder="vae"',
    }
    literals = {name: literal(name, value) for name, value in numbers.items()}
    sigmas = listed = ""
    if schedules.needs_sigmas(card, card.steps):
        sigmas = f"\n    sigmas={schedules.sigmas(card, card.steps)},"
    if isinstance(card.sampler.schedule, Listed):
        listed = str(schedules.sigmas(card, card.sampler.schedule.most_steps))
    text = string.Template(text).substitute(**literals, **names, sigmas=sigmas, listed=listed)
    return text.removeprefix("\n")
