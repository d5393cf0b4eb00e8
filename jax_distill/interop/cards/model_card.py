"""What stands beside exported weights: the scheduler's config, and how to draw with them."""

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from jax_distill.interop import flux_config
from jax_distill.interop.cards import snippets
from jax_distill.interop.time_scale import Refitted
from jax_distill.models.inputs import GUIDANCE, INPUTS
from jax_distill.storage.quoting import literal, prose

# Of a refitted time embedder's variation, in stock pipelines of bfloat16; a test measures them.
LOST_IN_BFLOAT16, LOST_IN_FLOAT32 = 0.05, 0.013

METHODS: Mapping[str, str] = {
    "flow_matching": "A teacher, made by flow matching",
    "time_rescale": "A teacher whose network takes the time in another scale",
    "scm": "A student by sCM (continuous-time consistency distillation, arXiv:2410.11081)",
    "meanflow": "A student by MeanFlow (arXiv:2505.13447)",
    "imm": "A student by IMM (inductive moment matching, arXiv:2503.07565)",
}
_FILES = {
    "diffusers": "The folder loads with diffusers' `DiffusionPipeline.from_pretrained`",
    "t2i_distill": '`model.pt` is `{"module": state_dict}`, as T2I-Distill has it',
    "safetensors": "`model.safetensors` has the transformer under diffusers' names",
    "lora": "`pytorch_lora_weights.safetensors` has adapters for diffusers' `load_lora_weights`",
}

TEACHER = "FLUX"  # in programs, for a folder that is not known


@dataclasses.dataclass(frozen=True)
class Base:
    """The network that exported adapters are beside.

    Attributes:
      where: it is to be had, in Markdown of this program's own.
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
      dtype: of the network's tensors, in words.
      time_scale, guidance_factor: what the exported network multiplies t and the guidance scale
        with before it embeds them.
      refits: the embedders that are no longer as they were, by name.
      guidance: scale to draw with.
      guidance_embeds: whether the network takes the scale as an input.
      guided: whether it is a plain teacher, which the empty caption guides.
      interval_embeds: whether it has the second time embedder.
      steps: that the sampler takes.
      resolution: height and width in pixels.
      patch: pixels that a token spans along each axis.
      channels: of a token.
      time_shift: mu of the schedule at this resolution.
      sampler: what the method's objective says of its sampler: sCM's middle_angle, IMM's time_max
        and sampler.
      captions: whose embeddings are in examples.safetensors; none where there are text encoders.
      text_length: of T5's sequences.
      has_autoencoder: whether it is exported too.
      has_text: whether the text encoders are.
      scheduler: the config of one that diffusers has, where `time_shift` is not the method's own.
      scores: of the run's evaluation, by steps.
      base: what the adapters of the layout "lora" are beside.
      assumed: sentences about what nothing told of a ported network.
    """

    name: str
    method: str
    layout: str
    dtype: str
    time_scale: float
    guidance_factor: float
    refits: Mapping[str, Refitted]
    guidance: float
    guidance_embeds: bool
    guided: bool
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
    scores: Mapping[int, float] = dataclasses.field(default_factory=dict)
    base: Base | None = None
    assumed: Sequence[str] = ()

    def __post_init__(self):
        """Raises ValueError when a value that programs or sentences show as a number is none."""
        names = ("time_scale", "guidance_factor", "guidance", "steps", "patch", "channels")
        numbers = {name: getattr(self, name) for name in (*names, "time_shift", "text_length")}
        numbers |= {"height": self.resolution[0], "width": self.resolution[1]}
        numbers |= {key: x for key, x in self.sampler.items() if key != "sampler"}
        numbers |= {f"score in {steps} steps": score for steps, score in self.scores.items()}
        for name, value in numbers.items():
            literal(name, value)


def scheduler_config(card: Card) -> dict[str, Any]:
    """The scheduler_config.json of the schedule that stock `FluxPipeline` is to walk.

    In linear coordinates a restart from predicted data, sCM's step, is the Euler scheduler's with
    stochastic sampling. sCM's middle angle is where its shift moves 1/2 to, so that one and two
    steps are those of sCM.
    """
    if card.method not in ("scm", "imm") and card.scheduler is not None:
        return dict(card.scheduler)
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": _shift(card),
    }
    return config | ({"stochastic_sampling": True} if _restarts(card) else {})


def _shift(card: Card) -> float:
    """Of the scheduler, s in t' = s t / (1 + (s - 1) t)."""
    if card.method == "scm":
        return math.tan(card.sampler["middle_angle"])
    return math.exp(card.time_shift)


def _restarts(card: Card) -> bool:
    """Whether each step goes to data, and from there back with fresh noise."""
    return card.method == "scm" or card.sampler.get("sampler") == "restart"


def program(card: Card) -> str:
    """Python that draws with the exported files, to be run beside them."""
    return _pipeline_program(card) if card.layout == "diffusers" else _own_program(card)


def _pipeline_program(card: Card) -> str:
    """Draws with diffusers' pipeline as it is, or with the one that the folder has."""
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
    return _filled(_assembled(snippets.PIPELINE.lstrip("\n"), pieces), card)


def _own_program(card: Card) -> str:
    """Makes the network, whatever it embeds, and walks the schedule."""
    head, load = snippets.HEAD, [snippets.STATE[card.layout]]
    if card.interval_embeds:
        head = head.replace("from safetensors", snippets.IMPORT_EMBEDDING + "from safetensors")
        load += [snippets.SECOND]
    load += [snippets.FROM_STATE]
    load += [snippets.ADAPTERS] if card.base else []
    if card.interval_embeds:
        load += [snippets.TWO_TIMES, snippets.USE_TWO_TIMES]
    schedules = {"scm": snippets.SCM_SCHEDULE, "imm": snippets.IMM_SCHEDULE}
    interval = snippets.INTERVAL if card.interval_embeds else ""
    schedule = schedules.get(card.method, "")
    null = snippets.NULL if card.guided else ""
    pieces = [
        head,
        *load,
        snippets.REST,
        *([snippets.EXAMPLES] if card.captions else []),
        snippets.NETWORK,
        snippets.GUIDED if card.guided else snippets.PLAIN,
        snippets.DECODE,
        _assembled(snippets.DRAW, {"schedule": schedule, "interval": interval}),
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
    length = "t" if _restarts(card) else "t - s"
    return _filled(_assembled(text, {"guidance_input": embeds, "length": length}), card)


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


def _filled(text: str, card: Card) -> str:
    """Python with the card's values in it: nothing but finite numbers, and names of this program.

    Raises:
      ValueError: a value is no number.
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
        "mu": card.time_shift,
        "shift": _shift(card),
        "time_max": card.sampler.get("time_max", 1.0),
        "text_length": card.text_length,
    }
    names = {
        "folder": "." if card.has_text else TEACHER,
        "teacher": TEACHER,
        "vae": 'FOLDER / "vae"' if card.has_autoencoder else f'"{TEACHER}", subfolder="vae"',
    }
    literals = {name: literal(name, value) for name, value in numbers.items()}
    return string.Template(text).substitute(**literals, **names)


def _schedule(card: Card) -> str:
    """The times of the sampler, in words."""
    if card.method == "scm":
        angle = card.sampler["middle_angle"]
        return (
            f"TrigFlow's angles pi/2, {angle} and 0 at two steps, otherwise even from pi/2 to 0;"
            " fresh noise each step"
        )
    shifted = f"shifted: t' = e^mu / (e^mu + 1/t - 1) with mu = {card.time_shift:.4g}"
    if card.method == "imm":
        return f"{card.sampler['time_max']} times even times from 1 to 0, {shifted}"
    dynamic = scheduler_config(card).get("use_dynamic_shifting", False)
    return f"even times from 1 to 0, {shifted}" + (" at this resolution" if dynamic else "")


def text(card: Card) -> str:
    """The README.md of the exported folder."""
    lines = [
        f"# {prose(card.name)}",
        "",
        f"{METHODS[card.method]}; exported by jax_distill. {_FILES[card.layout]}.",
        "",
        f"- method: {card.method}",
        f"- steps: {card.steps}",
        f"- schedule: {_schedule(card)}",
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
    code = program(card)
    if f'"{TEACHER}"' in code:
        teacher = card.base.where if card.base else "the diffusers folder of the teacher"
        lines += [f'Where it says "{TEACHER}", put {teacher}.', ""]
    lines.append(_python(code))
    if card.layout == "diffusers":
        lines += _of_pipelines(card)
    elif card.base is not None and _stock_adapters(card):
        lines += ["## Drawing, with diffusers' pipeline as it is", ""]
        lines.append(_python(_filled(snippets.PIPELINE_ADAPTERS.lstrip("\n"), card)))
    return "\n".join(lines)


def _python(code: str) -> str:
    return f"```python\n{code}```\n"


def _stock_adapters(card: Card) -> bool:
    """Whether the teacher's own pipeline can draw with the adapters."""
    return card.base.same_inputs and not card.captions and not card.interval_embeds


def _of_pipelines(card: Card) -> list[str]:
    """What a reader must know of the folder's pipeline."""
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
    if card.method == "scm":
        lines += [
            "The scheduler's shift gives the schedule at one and two steps; at four add"
            f" `sigmas={_four_sigmas(card)}`.",
            "",
        ]
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


def _four_sigmas(card: Card) -> list[float]:
    """sCM's four angles, before the scheduler's shift."""
    tangents = [math.tan(math.pi / 2 * (1 - step / 4)) for step in range(4)]
    return [round(x / (x + _shift(card)), 6) for x in tangents]


def _refitted(name: str, refit: Refitted, card: Card) -> str:
    """What has become of an embedder."""
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
    return ", as diffusers has it" if card.time_scale == flux_config.TIME_SCALE else ""
