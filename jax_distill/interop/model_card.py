"""What stands beside exported weights: the scheduler's config, and how to draw with them."""

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from jax_distill.interop import flux_config, snippets

METHODS: Mapping[str, str] = {
    "flow_matching": "A teacher, made by flow matching",
    "time_rescale": "A teacher whose network takes the time in another scale",
    "scm": "A student by sCM (continuous-time consistency distillation, arXiv:2410.11081)",
    "meanflow": "A student by MeanFlow (arXiv:2505.13447)",
    "imm": "A student by IMM (inductive moment matching, arXiv:2503.07565)",
}
_SCHEDULERS = {
    "scm": "SCMScheduler",
    "meanflow": "FlowMapEulerDiscreteScheduler",
    "imm": "FlowMapEulerDiscreteScheduler",
}
_FILES = {
    "diffusers": "`transformer/` loads with diffusers' `FluxTransformer2DModel.from_pretrained`",
    "t2i_distill": '`model.pt` is `{"module": state_dict}`, as T2I-Distill has it',
    "safetensors": "`model.safetensors` has the transformer under diffusers' names",
    "lora": "`pytorch_lora_weights.safetensors` has adapters for diffusers' `load_lora_weights`",
}

TEACHER = "FLUX"  # in programs, for a folder that is not known


@dataclasses.dataclass(frozen=True)
class Base:
    """The network that exported adapters are beside.

    Attributes:
      where: it is to be had, in words.
      rank: of the adapters.
      int8: whether they were trained beside its kernels in int8.
      same_inputs: whether it takes guidance and interval as the student does.
    """

    where: str
    rank: int
    int8: bool
    same_inputs: bool


@dataclasses.dataclass(frozen=True)
class Card:
    """What is exported.

    Attributes:
      name: of the run.
      method: one of `METHODS`.
      layout: "diffusers", "t2i_distill", "safetensors" or "lora".
      time_scale, guidance_factor: what the exported network multiplies t and the guidance scale
        with before it embeds them.
      residual: of the refitted time embedders; None when they are as they were.
      guidance: scale to draw with.
      guidance_embeds: whether the network takes the scale as an input.
      interval_embeds: whether it has the second time embedder.
      steps: that the sampler takes.
      resolution: height and width in pixels.
      patch: pixels that a token spans along each axis.
      channels: of a token.
      time_shift: mu of the schedule at this resolution.
      sampler: what the method's objective says of its sampler: sCM's data_scale and middle_angle,
        IMM's time_max and sampler.
      captions: whose embeddings are in examples.safetensors; none where there are text encoders.
      text_length: of T5's sequences.
      has_autoencoder: whether it is exported too.
      has_text: whether the text encoders are.
      scheduler: the config of a teacher's own.
      scores: of the run's evaluation, by steps.
      base: what the adapters of the layout "lora" are beside.
      assumed: sentences about what nothing told of a ported network.
    """

    name: str
    method: str
    layout: str
    time_scale: float
    guidance_factor: float
    residual: float | None
    guidance: float
    guidance_embeds: bool
    interval_embeds: bool
    steps: int
    resolution: tuple[int, int]
    patch: int
    channels: int
    time_shift: float
    sampler: Mapping[str, Any]
    captions: Sequence[str] = ()
    text_length: int = 0
    has_autoencoder: bool = True
    has_text: bool = False
    scheduler: Mapping[str, Any] | None = None
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    base: Base | None = None
    assumed: Sequence[str] = ()


def scheduler_config(card: Card) -> dict[str, Any]:
    """The scheduler_config.json that fits the method, of a class that diffusers has."""
    if card.method not in _SCHEDULERS and card.scheduler is not None:
        return dict(card.scheduler)
    kind = _SCHEDULERS.get(card.method, "FlowMatchEulerDiscreteScheduler")
    config: dict[str, Any] = {"_class_name": kind, "num_train_timesteps": 1000}
    if card.method == "scm":
        return config | {"prediction_type": "trigflow", "sigma_data": card.sampler["data_scale"]}
    # IMM's times do not begin at 1: the program makes them itself.
    return config | {"shift": 1.0 if card.method == "imm" else math.exp(card.time_shift)}


def program(card: Card) -> str:
    """Python that draws with the exported files, to be run beside them."""
    head, load = snippets.HEAD, []
    if card.interval_embeds:
        head = head.replace("from safetensors", snippets.IMPORT_EMBEDDING + "from safetensors")
        load = [snippets.STATE[card.layout], snippets.SECOND, snippets.FROM_STATE]
        load += [snippets.ADAPTERS] if card.base else []
        load += [snippets.TWO_TIMES, snippets.USE_TWO_TIMES]
    elif card.base:
        load = [snippets.STATE[card.layout], snippets.FROM_STATE, snippets.ADAPTERS]
    elif card.layout == "diffusers":
        load = [snippets.FROM_PRETRAINED]
    else:
        load = [snippets.STATE[card.layout], snippets.FROM_STATE]
    if card.method == "imm" and card.sampler["sampler"] == "restart":
        draw = snippets.DRAW_IMM_RESTART
    else:
        draw = {
            "scm": snippets.DRAW_SCM,
            "meanflow": snippets.DRAW_MEANFLOW,
            "imm": snippets.DRAW_IMM,
        }.get(card.method, snippets.DRAW_TEACHER)
    # A plain teacher is guided by an empty caption, where one is at hand.
    guided = card.method == "flow_matching" and not card.guidance_embeds and card.captions
    pieces = [
        head,
        *load,
        snippets.REST,
        *([snippets.EXAMPLES] if card.captions else []),
        snippets.NETWORK,
        snippets.GUIDED if guided else snippets.PLAIN,
        snippets.DECODE,
        draw,
        snippets.DRAW_EXAMPLES if card.captions else snippets.DRAW_PROMPT,
    ]
    embeds = "None"
    if card.guidance_embeds:
        stock = card.guidance_factor == flux_config.GUIDANCE_FACTOR
        factor = "" if stock else f" * {card.guidance_factor / flux_config.GUIDANCE_FACTOR:g}"
        embeds = f"torch.full((len(x),), float(guidance){factor})"
    text = _joined(pieces)
    if "load_file(" not in text:
        text = text.replace("from safetensors.torch import load_file\n", "")
    return _filled(text, card, guidance_input=embeds)


def _joined(pieces: Sequence[str]) -> str:
    """Pieces of Python, definitions set apart."""
    text = ""
    for piece in (piece.strip("\n") for piece in pieces):
        definition = piece.startswith(("def ", "class ", "@", "if "))
        if text:
            text += "\n\n\n" if definition or text.rpartition("\n")[2].startswith(" ") else "\n\n"
        text += piece
    return text + "\n"


def _filled(text: str, card: Card, **more: str) -> str:
    height, width = card.resolution
    return string.Template(text).substitute(
        height=height,
        width=width,
        patch=card.patch,
        rows=height // card.patch,
        columns=width // card.patch,
        channels=card.channels,
        time_scale=card.time_scale,
        guidance=card.guidance,
        steps=card.steps,
        mu=card.time_shift,
        shift=math.exp(card.time_shift),
        scheduler=scheduler_config(card)["_class_name"],
        middle=card.sampler.get("middle_angle"),
        time_max=card.sampler.get("time_max"),
        text_length=card.text_length,
        folder="." if card.has_text else TEACHER,
        teacher=TEACHER,
        vae='FOLDER / "vae"' if card.has_autoencoder else f'"{TEACHER}", subfolder="vae"',
        **more,
    )


def _schedule(card: Card) -> str:
    """The times of the sampler, in words."""
    shifted = f"t' = e^mu / (e^mu + 1/t - 1) with mu = {card.time_shift:.4g}"
    if card.method == "scm":
        middle = f"pi/2, {card.sampler['middle_angle']} and 0 at two steps"
        return f"TrigFlow's angles: {middle}, otherwise even from pi/2 to 0; fresh noise each step"
    if card.method == "imm":
        time_max = card.sampler["time_max"]
        return f"{time_max} times even times from 1 to 0, shifted: {shifted}"
    return f"even times from 1 to 0, shifted: {shifted}"


def text(card: Card) -> str:
    """The README.md of the exported folder."""
    python = "```python\n{}```\n"
    scheduler = scheduler_config(card)["_class_name"]
    lines = [
        f"# {card.name}",
        "",
        f"{METHODS[card.method]}; exported by jax_distill. {_FILES[card.layout]}.",
        "",
        f"- method: {card.method}",
        f"- steps: {card.steps}",
        f"- schedule: {_schedule(card)}; diffusers' `{scheduler}` in `scheduler/`",
        f"- guidance: {card.guidance}" + _embedded_guidance(card),
        f"- resolution: {card.resolution[0]} x {card.resolution[1]}",
        f"- time: the network embeds {card.time_scale:g} t" + _stock(card),
    ]
    lines += [f"- assumed, for its source did not say: {words}" for words in card.assumed]
    if card.base is not None:
        lines += _beside(card.base)
    if card.residual is not None:
        lines.append(
            f"- time embedder: refitted for {card.time_scale:g} t; the embedding differs by at most"
            f" {card.residual:.1e} of its root mean square"
        )
    if card.scores:
        scores = ", ".join(f"{score:.3f} in {steps}" for steps, score in card.scores.items())
        lines.append(f"- score by steps: {scores}")
    lines += ["", "## Drawing, with torch and diffusers alone", ""]
    if card.captions:
        lines += ["`examples.safetensors` has the embeddings of these captions:", ""]
        lines += [f"- {caption}" for caption in card.captions] + [""]
    code = program(card)
    if f'"{TEACHER}"' in code:
        teacher = card.base.where if card.base else "the diffusers folder of the teacher"
        lines += [f'Where it says "{TEACHER}", put {teacher}.', ""]
    lines.append(python.format(code))
    whole = card.layout == "diffusers" and (card.captions or card.has_text)
    whole = whole or (card.base is not None and card.base.same_inputs and not card.captions)
    if card.method == "scm" and card.time_scale == 1000 and whole:
        lines += ["## Drawing, with diffusers' pipeline as it is", ""]
        lines.append(python.format(pipeline_program(card)))
    return "\n".join(lines)


def _embedded_guidance(card: Card) -> str:
    if not card.guidance_embeds:
        return ""
    words = f", embedded: the network embeds {card.guidance_factor:g} w of the scale w"
    if card.guidance_factor == flux_config.GUIDANCE_FACTOR:
        return words + ", as diffusers has it"
    return words + ", where diffusers' pipelines embed 1000 w"


def _beside(base: Base) -> list[str]:
    """What a reader must know of adapters."""
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
    if card.time_scale == 1000:
        return ", as diffusers has it"
    return "; diffusers' pipelines embed 1000 t: export with --time_scale=1000 for them"


def pipeline_program(card: Card) -> str:
    """Python that draws by sCM with diffusers' own `FluxPipeline`.

    In linear coordinates sCM's step is that of the Euler scheduler with stochastic sampling.
    """
    angles = [math.pi / 2, card.sampler["middle_angle"]] if card.steps == 2 else None
    angles = angles or [math.pi / 2 * (1 - step / card.steps) for step in range(card.steps)]
    times = [min(1.0, math.sin(a) / (math.sin(a) + math.cos(a))) for a in angles]
    prompt = snippets.PIPELINE_EXAMPLES if card.captions else snippets.PIPELINE_PROMPT
    prompt = snippets.PIPELINE_ADAPTERS if card.base else prompt
    return _filled(prompt.lstrip("\n"), card, sigmas=str(times))
