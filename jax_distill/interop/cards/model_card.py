"""The model card of an export: the README.md beside its weights."""

from jax_distill.interop import flux_config
from jax_distill.interop.cards import programs, schedules, snippets
from jax_distill.interop.cards.card import Base, Card
from jax_distill.interop.time_scale import Refitted
from jax_distill.models.inputs import GUIDANCE, INPUTS
from jax_distill.storage.quoting import prose

# Of a refitted time embedder's variation, in stock pipelines of bfloat16; a test measures them.
LOST_IN_BFLOAT16, LOST_IN_FLOAT32 = 0.05, 0.013

_FILES = {
    "diffusers": "The folder loads with diffusers' `DiffusionPipeline.from_pretrained`",
    "t2i_distill": '`model.pt` is `{"module": state_dict}`, as T2I-Distill has it',
    "safetensors": "`model.safetensors` has the transformer under diffusers' names",
    "lora": "`pytorch_lora_weights.safetensors` has adapters for diffusers' `load_lora_weights`",
}


def text(card: Card) -> str:
    """The README.md of the exported folder."""
    lines = [
        f"# {prose(card.name)}",
        "",
        f"{card.summary}; exported by jax_distill. {_FILES[card.layout]}.",
        "",
        f"- method: {card.method}",
        f"- steps: {card.steps}",
        f"- schedule: {schedules.words(card)}",
        f"- guidance: {_guidance(card)}",
        f"- resolution: {card.resolution[0]} x {card.resolution[1]}",
        f"- time: the network embeds {card.time_scale:g} t" + _stock(card),
        f"- type: {prose(card.dtype)}",
        *(_refitted(name, refit, card) for name, refit in card.refits.items()),
    ]
    lines += [f"- assumed, for its source did not say: {prose(words)}" for words in card.assumed]
    if card.base is not None:
        lines += _beside(card.base)
    if card.scores:
        scores = ", ".join(f"{score:.3f} in {steps:d}" for steps, score in card.scores.items())
        lines.append(f"- score by steps: {scores}")
    lines += ["", "## Drawing, with torch and diffusers alone", ""]
    if card.captions:
        lines += ["`examples.safetensors` has the embeddings of these captions:", ""]
        lines += [f"- {prose(caption)}" for caption in card.captions] + [""]
    code = programs.program(card)
    if f'"{programs.TEACHER}"' in code:
        teacher = card.base.where if card.base else "the diffusers folder of the teacher"
        lines += [f'Where it says "{programs.TEACHER}", put {teacher}.', ""]
    lines.append(_python(code))
    if card.layout == "diffusers":
        lines += _of_pipelines(card)
    elif card.base is not None and _stock_adapters(card):
        lines += ["## Drawing, with diffusers' pipeline as it is", ""]
        lines.append(_python(programs.filled(snippets.PIPELINE_ADAPTERS, card)))
    return "\n".join(lines)


def _python(code: str) -> str:
    return f"```python\n{code}```\n"


def _stock_adapters(card: Card) -> bool:
    """Whether the teacher's own pipeline can draw with the adapters."""
    return card.base.same_inputs and not card.captions and not card.interval_embeds


def _of_pipelines(card: Card) -> list[str]:
    """Facts about the folder's pipeline."""
    lines = []
    if card.interval_embeds:
        lines += [
            "The network has a second time embedder, of the length of a step, which diffusers'"
            " class does not have: `flow_map_pipeline.py` and `transformer/flow_map_transformer.py`"
            " do it, and `trust_remote_code=True` runs them. diffusers' own"
            " `FluxTransformer2DModel.from_pretrained` would leave that embedder out, and draw"
            " something else. With `dtype=torch.bfloat16` time, interval and guidance are still"
            " embedded in float32.",
            "",
        ]
    lines += _sigmas(card)
    if card.refits and not card.interval_embeds:
        lines += [
            "## In bfloat16",
            "",
            "`dtype=torch.bfloat16` narrows the refitted embedders, too, and computes with them in"
            f" it: at FLUX's width that took {LOST_IN_BFLOAT16} of what tells one time from another"
            f" (its variation over t). This keeps them in float32, which took {LOST_IN_FLOAT32}, as"
            " diffusers rounds t itself; give what it makes to"
            " `DiffusionPipeline.from_pretrained` as `transformer=transformer`, with the same"
            " `dtype`.",
            "",
            _python(snippets.BFLOAT16.lstrip("\n")),
        ]
    return lines


def _sigmas(card: Card) -> list[str]:
    """The times that the folder's pipeline must be given, if any."""
    needed = dict(schedules.steps_with_sigmas(card))
    given = [f"`sigmas={schedules.sigmas(card, n)}` in {n}" for n in needed if needed[n]]
    alone = " and ".join(str(n) for n in needed if not needed[n])
    if not given:
        return []
    words = f"in {alone} steps" if alone else "in no number of steps: it begins at 1"
    words = f"By itself the pipeline walks this schedule {words}. Give it {', '.join(given)}."
    return [words, ""]


def _refitted(name: str, refit: Refitted, card: Card) -> str:
    """The line about a refitted embedder."""
    upper = next(x.upper for x in INPUTS if x.embedder == name)
    guidance = name == GUIDANCE.embedder
    what = f"{card.guidance_factor:g} w" if guidance else f"{card.time_scale:g} t"
    text = f"- {name.replace('_', ' ')}: refitted for {what}; it differs by at most"
    text += f" {refit.residual:.1e} of its variation over [0, {upper:g}]"
    if refit.step:
        text += (
            f" at multiples of {refit.step:g}, which are the scales to draw with, and by up to"
            f" {refit.between:.2g} times it in between"
        )
    if card.layout == "diffusers":
        text += "; as it was, it is in `transformer/own_embedders.safetensors`"
    return text


def _guidance(card: Card) -> str:
    """The scale, and how it is applied."""
    if card.guided:
        return f"{card.guidance}, classifier-free: away from the empty caption"
    if not card.guidance_embeds:
        return "none, the network takes no scale"
    words = (
        f"{card.guidance}, embedded: the network embeds {card.guidance_factor:g} w of the scale w"
    )
    if card.guidance_factor == flux_config.GUIDANCE_FACTOR:
        return words + ", as diffusers has it"
    return words + ", where diffusers' pipelines embed 1000 w"


def _beside(base: Base) -> list[str]:
    """Facts about adapters."""
    lines = [
        f"- adapters: of rank {base.rank}, alpha / rank is in their weights; they go beside"
        f" {base.where}",
        "- embedders: `embedders.safetensors` has what adapters cannot express, the student's"
        " embedders of time, guidance and interval as far as it has them, whole; they replace the"
        " base's, without them the adapters alone are not this network",
    ]
    if base.int8:
        lines.append(
            "- int8: the adapters were trained beside kernels rounded to int8 by output channel;"
            " beside the unrounded ones pictures differ a little"
        )
    return lines


def _stock(card: Card) -> str:
    return ", as diffusers has it" if card.time_scale == flux_config.TIME_SCALE else ""
