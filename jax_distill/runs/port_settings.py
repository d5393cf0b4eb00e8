"""Facts about a network that its weights do not show: from flags, from a base, or assumed aloud.

Tensors leave open which factors multiply a network's times and guidance scales, what it was trained
for, its schedule and the length of its captions. Each is taken from what the files say, or from a
flag. If neither says it, it is asked for, unless nearly all such files agree; then it is assumed,
and the assumption is kept with the network.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill.assembly import build
from jax_distill.interop import flux_config
from jax_distill.interop.readers.sources import Source
from jax_distill.interop.scheduler_config import EULER, FLUX_DEV
from jax_distill.models.sizes import LONGEST
from jax_distill.storage.files import parse_json
from jax_distill.storage.quoting import shown

TEXT_LENGTH = 256  # of FLUX.1-schnell and lite; dev has 512
_T2I_DISTILL = {"time_scale": 1.0, "guidance_factor": 1.0}
_SHIFT = "--shift: give base, dynamic (as FLUX.1-dev's) or a number above 0 (1 as FLUX.1-schnell's)"


class Flags(NamedTuple):
    """The user's statements about a network; empty or None where there is none.

    Attributes:
      objective: that it was trained for, a key of `build.OBJECTIVES`.
      time_scale, guidance_factor: by which it multiplies t and the guidance scale.
      shift: of the schedule: "base", "dynamic" or a number.
      text_length: of T5's sequences.
      guidance: how it is guided as a teacher, one of `build.GUIDANCE`.
    """

    objective: str = ""
    time_scale: float | None = None
    guidance_factor: float | None = None
    shift: str = ""
    text_length: int | None = None
    guidance: str = "auto"


class Settings(NamedTuple):
    """Facts about a network beside its weights.

    Attributes:
      objective: that it was trained for, the section of a configuration.
      factors: of `flux_config.FACTORS`.
      scheduler: diffusers' config; None for FLUX's own.
      text_length: of T5's sequences.
      guidance: how it is guided as a teacher, one of `build.GUIDANCE`.
      assumed: sentences about facts that nothing stated.
    """

    objective: dict[str, Any]
    factors: dict[str, float]
    scheduler: Mapping[str, Any] | None
    text_length: int
    guidance: str
    assumed: list[str]


def settle(
    source: Source,
    flags: Flags,
    base: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> Settings:
    """Combines what files, flags and a base say.

    Args:
      source: the weights.
      flags: of the user.
      base: `ported_folder.describe` of the folder with the other parts, for a transformer alone.
      scheduler: the config in the source's own folder, if it is one of all parts.

    Raises:
      ValueError: a flag is missing, or contradicts the files.
    """
    assumed: list[str] = []
    where = source.parts["network"].where
    objective = _objective(where, source, flags, scheduler, assumed)
    factors = _factors(where, source, flags, objective, assumed)
    if source.folder is None and base is not None:
        _check_base(where, source, flags, base)
    scheduler = _scheduler(source, flags, base, scheduler, assumed)
    if scheduler is not None and objective not in build.TEACHERS:  # restarts are of its method
        scheduler = {key: x for key, x in scheduler.items() if key != "stochastic_sampling"}
    length = _text_length(flags, base, assumed)
    guidance = _guidance(where, source, flags, objective, assumed)
    section = _objective_section(where, source, objective)
    return Settings(section, factors, scheduler, length, guidance, assumed)


def _contradiction(flag: str, where: str, told: Any, given: Any) -> ValueError:
    return ValueError(f"--{flag}: '{where}' says {told}, which is not {given}; leave it out")


def _objective(
    where: str,
    source: Source,
    flags: Flags,
    scheduler: Mapping[str, Any] | None,
    assumed: list[str],
) -> str:
    """The objective that the network was trained for."""
    told = source.told.get("objective")
    if told is not None and told not in tuple(build.OBJECTIVES):
        known = ", ".join(build.OBJECTIVES)
        raise ValueError(f"'{where}': unknown objective {shown(told)}; known: {known}")
    if told and flags.objective and told != flags.objective:
        raise _contradiction("objective", where, told, flags.objective)
    if told or flags.objective:
        return told or flags.objective
    if flux_config.has_interval(source.parts["network"].tensors):
        assumed.append(
            "the network was trained by MeanFlow; one by IMM has the same tensors (--objective=imm)"
        )
        return "meanflow"
    if source.layout == "t2i_distill" or source.loss_head:
        assumed.append(
            "the network was trained by sCM, as T2I-Distill's are that have no second time embedder"
        )
        return "scm"
    scale = source.told.get("time_scale", flags.time_scale)
    rescaled = scale not in (None, flux_config.TIME_SCALE)
    foreign = scheduler is not None and scheduler.get("_class_name", EULER) != EULER
    if rescaled or foreign:
        sign = f"its {scheduler['_class_name']}" if foreign else "its time scale"
        raise ValueError(
            f"'{where}' does not say what its network was trained for, and {sign} is not a plain"
            f" teacher's; give --objective, one of {', '.join(build.OBJECTIVES)}"
        )
    if scheduler is None:
        assumed.append("the network is a teacher, made by flow matching")
    return "flow_matching"


def _objective_section(where: str, source: Source, name: str) -> dict[str, Any]:
    """The objective with the settings that the files tell, on which its sampler depends."""
    text = source.told.get("objective_settings")
    if not isinstance(text, str) or source.told.get("objective") != name:
        return {"name": name}
    said = f"'{where}': objective_settings"
    values = parse_json(text, dict[str, Any], where=said, fix="export it again")
    section = {**values, "name": name}
    try:
        configuration.check_objective(section)
        build.without_networks(ConfigDict({"objective": section}))
    except ValueError as error:
        raise ValueError(f"{said}: {error}; export it again with this version") from None
    return section


def _factors(
    where: str, source: Source, flags: Flags, objective: str, assumed: list[str]
) -> dict[str, float]:
    """The factors of t and the guidance scale before they are embedded."""
    embeds = source.parts["network"].config.get("guidance_embeds", False)
    if flags.guidance_factor is not None and not embeds:
        raise ValueError(f"--guidance_factor: '{where}' embeds no guidance scale; leave it out")
    known = {}
    for name in flux_config.FACTORS:
        told, given = source.told.get(name), getattr(flags, name)
        if told is not None and given is not None and told != given:
            raise _contradiction(name, where, f"{told:g}", f"{given:g}")
        if told is not None or given is not None:
            known[name] = given if told is None else told
    needed = [name for name in flux_config.FACTORS if embeds or name == "time_scale"]
    missing = [name for name in needed if name not in known]
    usual, whose = _usual_factors(source, flags, objective)
    if missing and (usual is None or any(known.get(k, usual[k]) != usual[k] for k in needed)):
        stock = " ".join(f"--{name}={flux_config.FACTORS[name]:g}" for name in missing)
        theirs = " ".join(f"--{name}={_T2I_DISTILL[name]:g}" for name in missing)
        inputs = {"time_scale": "t", "guidance_factor": "the guidance scale"}
        words = " and ".join(inputs[name] for name in missing)
        raise ValueError(
            f"'{where}' does not say by what its network multiplies {words} before the embedding;"
            f" give {stock} (as FLUX's do) or {theirs} (as T2I-Distill's do)"
        )
    if missing and source.kind not in ("pipeline", "transformer"):
        words = {"time_scale": "{:g} t", "guidance_factor": "{:g} w of the guidance scale w"}
        factors = " and ".join(words[name].format(usual[name]) for name in missing)
        assumed.append(f"the network embeds {factors}, as {whose} networks do")
    return {**flux_config.FACTORS, **(usual or {}), **known}


def _usual_factors(
    source: Source, flags: Flags, objective: str
) -> tuple[Mapping[str, float] | None, str]:
    """The usual factors of files like this one, and whose they are; None where files differ.

    A state dict of PyTorch may be FLUX's, or T2I-Distill's before or after the time was rescaled. A
    student in another file may embed t, or 1000 t for a stock pipeline.
    """
    if source.layout == "t2i_distill":
        return (None if flags.objective in build.TEACHERS else _T2I_DISTILL), "T2I-Distill's"
    if source.kind == "torch" or ("objective" not in source.told and objective != "flow_matching"):
        return None, ""
    return flux_config.FACTORS, "FLUX's"


def _check_base(where: str, source: Source, flags: Flags, base: Mapping[str, Any]) -> None:
    """Raises ValueError when schedule and text length may not be the base's and no flag tells."""
    ours, theirs = (
        values.get("guidance_embeds", False)
        for values in (source.parts["network"].config, base["parts"]["network"])
    )
    if ours == theirs:
        return
    shift, length, model = ("dynamic", 512, "dev") if ours else ("1", 256, "schnell")
    usual, same = [], []
    if not flags.shift:
        usual, same = [f"--shift={shift}"], ["--shift=base"]
    if flags.text_length is None:
        usual.append(f"--text_length={length}")
        same.append(f"--text_length={base['text_length']}")
    if same:
        has, other = ("a", "that of --base none") if ours else ("no", "that of --base one")
        raise ValueError(
            f"'{where}' has {has} guidance embedder and {other}, so that they may be drawn from in"
            f" different ways; give {' '.join(usual)} (as FLUX.1-{model}) or {' '.join(same)} (as"
            " --base)"
        )


def _scheduler(
    source: Source,
    flags: Flags,
    base: Mapping[str, Any] | None,
    own: Mapping[str, Any] | None,
    assumed: list[str],
) -> Mapping[str, Any] | None:
    """The scheduler's config, from which the schedule's shift is read."""
    if own is not None and own.get("_class_name", EULER) == EULER:
        if flags.shift:
            raise ValueError("--shift: the folder has a scheduler of its own; leave it out")
        return own
    if flags.shift == "base":
        if base is None:
            raise ValueError("--shift=base: needs --base; give it, or another shift")
        return base["scheduler"]
    if flags.shift:
        return _given_shift(flags.shift)
    if base is not None:
        assumed.append("the schedule is that of --base")
        return base["scheduler"]
    if not source.parts["network"].config.get("guidance_embeds", False):
        where = source.parts["network"].where
        raise ValueError(
            f"'{where}' has no guidance embedder and no scheduler of FLUX's; give --shift=1 (as"
            " FLUX.1-schnell's) or --shift=dynamic (as FLUX.1-dev's)"
        )
    assumed.append("the schedule is shifted by the number of tokens, as FLUX.1-dev's is")
    return own


def _given_shift(text: str) -> dict[str, Any]:
    if text == "dynamic":
        return dict(FLUX_DEV)
    try:
        shift = float(text)
    except ValueError:
        raise ValueError(f"{_SHIFT}, not {text!r}") from None
    if not 0 < shift <= 10**6:
        raise ValueError(f"{_SHIFT}, not {text!r}")
    return {
        "_class_name": EULER,
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "shift": shift,
    }


def _text_length(flags: Flags, base: Mapping[str, Any] | None, assumed: list[str]) -> int:
    if flags.text_length is not None:
        if not 2 <= flags.text_length <= LONGEST:
            raise ValueError(f"--text_length: {flags.text_length} is not between 2 and {LONGEST}")
        return flags.text_length
    if base is not None:
        assumed.append(f"captions are of {base['text_length']} tokens, as those of --base")
        return base["text_length"]
    assumed.append(
        f"captions are of {TEXT_LENGTH} tokens, as FLUX.1-schnell's and lite's; FLUX.1-dev was made"
        " with 512 (--text_length=512)"
    )
    return TEXT_LENGTH


def _guidance(where: str, source: Source, flags: Flags, objective: str, assumed: list[str]) -> str:
    """How the network is guided as a teacher."""
    embeds = source.parts["network"].config.get("guidance_embeds", False)
    if (told := source.told.get("guidance", "auto")) not in tuple(build.GUIDANCE):
        known = ", ".join(build.GUIDANCE)
        raise ValueError(f"'{where}': unknown guidance {shown(told)}; known: {known}")
    if "auto" not in (told, flags.guidance) and told != flags.guidance:
        raise _contradiction("guidance", where, told, flags.guidance)
    if told != "auto":
        return told
    if flags.guidance == "auto":
        if objective == "flow_matching" and not embeds:
            assumed.append(
                "no guidance is applied, as to FLUX.1-schnell; for a teacher under classifier-free"
                " guidance give --guidance=cfg"
            )
        return "auto"
    if objective != "flow_matching":
        raise ValueError(
            f"--guidance={flags.guidance}: '{where}' is a student by {objective}; leave it out"
        )
    if embeds != (flags.guidance == "embedded"):
        has = "has a guidance embedder" if embeds else "has no guidance embedder"
        raise ValueError(f"--guidance={flags.guidance}: '{where}' {has}; leave it out")
    return flags.guidance
