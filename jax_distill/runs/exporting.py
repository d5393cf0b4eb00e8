"""From our networks to PyTorch's weights, with what it takes to draw with them."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl import logging
from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill import flow, pipeline, worlds
from jax_distill.assembly import adapters, build
from jax_distill.evaluation.results import read_results
from jax_distill.interop import (
    diffusers_folder,
    flux_config,
    layouts,
    lora_weights,
    ported_folder,
    time_scale,
)
from jax_distill.interop.cards import model_card
from jax_distill.interop.keys.transformer import TRANSFORMER_KEYS
from jax_distill.interop.orbax_tree import StoredLeaf, check_shapes, open_tree
from jax_distill.interop.parts import tensors_of
from jax_distill.interop.readers.safetensors_files import SHARD_BYTES
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.models.inputs import GUIDANCE, INPUTS
from jax_distill.models.mmdit import MMDiTConfig
from jax_distill.objectives.objective import STUDENT
from jax_distill.objectives.settings import settings_of
from jax_distill.storage.files import check_no_partial, read_json, write_atomically
from jax_distill.storage.outputs import made_whole
from jax_distill.storage.quoting import code, prose, shown, word
from jax_distill.training import checkpoint
from jax_distill.worlds.flux.world import (
    parts_folder,
    ported_config,
    ported_folders,
    schedule_shift,
    scheduler_of,
)
from jax_distill.worlds.shapes import bundled
from jax_distill.worlds.shapes.world import preview_captions

EXAMPLES = 8  # captions whose embeddings stand beside the weights
DTYPES = {"keep": None, "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_LARGEST_RESIDUAL = 0.02  # of refitted embedders, relative to their variation
_FLUX_SCHEDULE = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
}
_STEPS = {"scm": 2, "meanflow": 4, "imm": 4}  # that the card's program takes


class _Progress(TypedDict):
    """What stands beside a checkpoint, as far as it is read here."""

    checksums: dict[str, int]


class Weights(NamedTuple):
    """A network to export.

    Attributes:
      config: of its run.
      tree: its parameters, nested `StoredLeaf`s.
      check: raises ValueError when what was read of them is not what was saved.
      folder: its workdir or ported folder; None for the embedded teacher.
      teacher: whose frozen parameters the tree's adapters are beside; None where it has none.
    """

    config: ConfigDict
    tree: dict[str, Any]
    check: Callable[[], None]
    folder: Path | None
    teacher: "Weights | None" = None


def export(
    source: str,
    output: Path,
    *,
    layout: str = "diffusers",
    scale: float | None = None,
    dtype: str = "keep",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a network for PyTorch, with a README.md, whole or not at all.

    Args:
      source: a workdir, a ported folder, or "embedded".
      output: must not exist.
      layout: one of `layouts.LAYOUTS`.
      scale: time scale of the exported network; by default as `layouts.factors` has it.
      dtype: of the network's tensors, a key of `DTYPES`.
      shard_bytes: of the files of a diffusers folder.

    Raises:
      ValueError: the source has no network, it is damaged, it cannot be what the layout's readers
        need, the output exists, or the disk is full.
    """
    with made_whole(output) as partial:
        weights = _open(source)
        own, tree = build.network_config(weights.config), weights.tree
        guidance = "cfg" if build.needs_null(weights.config) else "auto"
        purpose = flux_config.Purpose(weights.config.objective.name, guidance)
        if layout == "lora" and weights.teacher is None:
            raise ValueError(
                f"--format=lora: '{source}' has no adapters, all of its parameters were trained;"
                " use --format=diffusers"
            )
        if layout == "lora" and DTYPES[dtype] is not None:
            raise ValueError("--dtype: --format=lora has adapters in float32; leave it out")
        config = dataclasses.replace(own, **layouts.factors(layout, own, scale))
        refits = _refits(own, tree, config)
        embedders = {name: refit.embedder for name, refit in refits.items()}
        tree = {**tree, **jax.tree.map(StoredLeaf, embedders)}
        if layout == "lora":
            layouts.write_adapters(partial, config, purpose, tree, weights.config.lora.rank)
            tensors = {}
        else:
            if weights.teacher is not None:
                tree = lora_weights.merged(tree, weights.config.lora.base == "int8")
            tensors = layouts.in_type(tensors_of(tree, TRANSFORMER_KEYS), DTYPES[dtype])
            layouts.write_transformer(partial, layout, config, purpose, tensors, shard_bytes)
        if layout == "diffusers" and refits:
            layouts.write_own_embedders(partial, own, purpose, weights.tree)
        weights.check()
        write = _flux if _world(weights.config) == "flux" else _shapes
        card = write(weights, partial, layout, config, refits=refits, dtype=layouts.types(tensors))
        layouts.write_scheduler(partial, card)
        if layout == "diffusers":
            if config.interval_embeds:
                layouts.write_flow_map(partial, card.sampler.get("time_max", 1.0))
            layouts.write_index(partial, flow_map=config.interval_embeds)
        write_atomically(partial / "README.md", model_card.text(card))


def _world(config: ConfigDict) -> str:
    return config.get("world", "shapes")  # runs of the first versions do not say


def _open(source: str) -> Weights:
    """Finds the network; nothing but descriptions is read."""
    if source == pipeline.EMBEDDED:
        params, description = bundled.load("teacher")
        config = ConfigDict(description["config"])
        return Weights(config, jax.tree.map(StoredLeaf, params), lambda: None, None)
    check_no_partial(source, "--checkpoint")
    folder = Path(source)
    config = (
        ported_config(folder) if ported_folder.is_ported(folder) else configuration.load(folder)
    )
    if (name := config.objective.name) == "autoencoder":
        raise ValueError(f"--checkpoint: '{folder}' is the run of an autoencoder, not of a network")
    if name not in tuple(build.OBJECTIVES):
        known = ", ".join(build.OBJECTIVES)
        raise ValueError(f"'{folder / 'config.json'}': objective {shown(name)} is none of {known}")
    if ported_folder.is_ported(folder):
        tree = open_tree(folder / "network")
        _check_shapes(folder, config, tree)
        return Weights(config, tree, lambda: None, folder)
    configuration.check_teachers(folder)
    step = folder / "checkpoints" / str(checkpoint.complete_steps(folder)[0])
    averaged = open_tree(step / "state", ("players", STUDENT, "ema"), checked=True)

    def check() -> None:
        """Compares with the checksum that was saved; the first versions saved none."""
        path = step / "progress" / "metadata"
        saved = read_json(path, _Progress)["checksums"] if path.exists() else {}
        found = sum(leaf.checksum() for leaf in jax.tree.leaves(averaged)) % 2**32
        if saved.get(f"{STUDENT}.ema", found) != found:
            raise ValueError(f"'{step}' is damaged: its checksums do not fit; move it elsewhere")

    beside = adapters.settings(config)
    if "network" not in averaged:
        raise ValueError(f"'{step}' holds no network; give another --checkpoint")
    if beside is None:
        _check_shapes(step, config, averaged["network"])
        return Weights(config, averaged["network"], check, folder)
    teacher = _open(config.teacher.checkpoint or pipeline.EMBEDDED)
    frozen = teacher.tree
    if teacher.teacher is not None:
        frozen = lora_weights.merged(frozen, teacher.config.lora.base == "int8")

    def check_both() -> None:
        check()
        teacher.check()

    whole = beside.attach(frozen, averaged["network"])
    return Weights(config, whole, check_both, folder, teacher)


def _check_shapes(where: Path, config: ConfigDict, tree: Mapping[str, Any]) -> None:
    """Raises ValueError when stored parameters are not those of the network in the config."""
    check_shapes(str(where), tree, diffusers_folder.shapes(build.network_config(config)))


def _refits(
    own: MMDiTConfig, tree: Mapping[str, Any], wanted: MMDiTConfig
) -> dict[str, time_scale.Refitted]:
    """The embedders that other factors change, by their names.

    Raises:
      ValueError: an embedder cannot be had at the factor that is wanted.
    """
    refits = {}
    for x in INPUTS:
        (name, factor, upper), guidance = x, x is GUIDANCE
        old, new = getattr(own, factor), getattr(wanted, factor)
        if name not in tree or old == new:
            continue
        embedder = jax.tree.map(lambda leaf: leaf.read(), tree[name])
        if guidance and new < old:
            refit = time_scale.rebuild(embedder, old, new, upper)
        else:
            refit = time_scale.refit(embedder, old, new, upper)
        if refit.residual > _LARGEST_RESIDUAL:
            scalar = "w" if guidance else "t"
            raise ValueError(
                f"{name}: an embedder of {new:g} {scalar} cannot be that of {old:g} {scalar}, it"
                f" would differ by {refit.residual:.1e} of its variation; train the network with"
                f" --config.model.{factor}={new:g}"
            )
        message = "%s: refitted from factor %g to %g, residual %.1e, in between %.1e"
        logging.info(message, name, old, new, refit.residual, refit.between)
        refits[name] = refit
    return refits


def _card(weights: Weights, layout: str, config: MMDiTConfig, **more: Any) -> model_card.Card:
    objective = build.objective(weights.config)
    resolution = worlds.of(weights.config).resolution
    shift = objective.time_shift if hasattr(objective, "time_shift") else 0.0
    if shift is None:  # of MeanFlow, for FLUX's own schedule
        shift = flow.flux_shift(build.token_shape(weights.config)[0])
    return model_card.Card(
        name=weights.config.name or "network",
        method=weights.config.objective.name,
        layout=layout,
        time_scale=config.time_scale,
        guidance_factor=config.guidance_factor,
        guidance=weights.config.evaluation.guidance,
        guidance_embeds=config.guidance_embeds,
        guided=build.needs_null(weights.config),
        interval_embeds=config.interval_embeds,
        steps=_STEPS.get(weights.config.objective.name, weights.config.samples.teacher_steps),
        resolution=tuple(resolution),
        patch=build.PATCH,
        channels=config.in_channels,
        time_shift=shift,
        sampler={
            name: getattr(objective, name)
            for name in ("middle_angle", "time_max", "sampler")
            if hasattr(objective, name)
        },
        scores=_scores(weights),
        base=_base(weights) if layout == "lora" else None,
        **more,
    )


def _follows_world(config: ConfigDict) -> bool:
    """Whether the sampler's schedule is shifted as its world says."""
    settings = settings_of(build.OBJECTIVES[config.objective.name]) | dict(config.objective)
    return settings.get("time_shift", 0.0) is None


def _base(weights: Weights) -> model_card.Base:
    """What adapters are beside."""
    teacher = weights.teacher
    folder = "embedded" if teacher.folder is None else str(teacher.folder)
    if teacher.folder is not None and ported_folder.is_ported(teacher.folder):
        where = f"the diffusers folder that '{prose(folder)}' was ported from"
    else:
        command = f"python -m jax_distill.export --checkpoint={word(folder)} --output=FLUX"
        where = f"what {code(command)} makes"
    inputs = ("guidance_embeds", "interval_embeds")
    return model_card.Base(
        where=where,
        rank=weights.config.lora.rank,
        int8=weights.config.lora.base == "int8",
        same_inputs=all(weights.config.model[key] == teacher.config.model[key] for key in inputs),
    )


def _scores(weights: Weights) -> dict[int, float]:
    """Scores by steps, of a run that has been evaluated."""
    found = read_results(weights.folder / "results.json") if weights.folder else None
    return {} if found is None else {steps: x.score for steps, x in found.student.items()}


def _shapes(
    weights: Weights, folder: Path, layout: str, config: MMDiTConfig, **more: Any
) -> model_card.Card:
    """Writes what belongs to a network of the shapes world; returns its card."""
    if layout != "lora":
        params, description = bundled.load("autoencoder")
        autoencoder = AutoencoderConfig.from_dict(description).to_dict()
        layouts.write_autoencoder(folder, autoencoder, jax.tree.map(StoredLeaf, params))
    world, captions = worlds.of(weights.config), preview_captions(EXAMPLES)
    text, null = world.encode(captions), world.null
    examples = {
        "sequence": text.sequence,
        "pooled": text.pooled,
        "null_sequence": null.sequence,
        "null_pooled": null.pooled,
    }
    examples = {name: np.ascontiguousarray(x, np.float32) for name, x in examples.items()}
    write_atomically(folder / "examples.safetensors", safetensors.numpy.save(examples))
    # Of the methods that leave their shift to the world, this one has FLUX's where that has none.
    follows = weights.config.objective.name == "meanflow" and _follows_world(weights.config)
    return _card(
        weights,
        layout,
        config,
        captions=captions,
        has_autoencoder=layout != "lora",  # which stands beside the base's weights
        scheduler=_FLUX_SCHEDULE if follows else None,
        **more,
    )


def _flux(
    weights: Weights, folder: Path, layout: str, config: MMDiTConfig, **more: Any
) -> model_card.Card:
    """Writes what belongs to a network of FLUX's world; returns its card."""
    scheduler = _FLUX_SCHEDULE if _follows_world(weights.config) else None
    home = theirs = None
    with contextlib.suppress(configuration.ConfigError):  # a transformer alone
        theirs = scheduler_of(str(weights.folder))
        home = parts_folder(str(weights.folder))
    if scheduler and theirs and theirs.get("_class_name") == scheduler["_class_name"]:
        scheduler = theirs
    told = assumed(weights.folder)
    if scheduler is not None and theirs is None:
        words = (
            "the schedule is FLUX.1-dev's, since the folder that it was ported from is not there"
        )
        logging.warning("assumed: %s", words)
        told = [*told, words]
    if home is None and scheduler is not None:
        tokens = build.token_shape(weights.config)[0]
        with weights.config.unlocked():
            weights.config.objective.time_shift = schedule_shift(scheduler, tokens)
    if home is not None:
        described = ported_folder.describe(home)
        parts, names = (described[key] for key in ("parts", "names"))
    if home is not None and layout != "lora":
        tree = ported_folder.open_part(home, "autoencoder", parts["autoencoder"])
        layouts.write_autoencoder(folder, parts["autoencoder"], tree)
    if home is not None and layout == "diffusers":
        for name in ("clip", "t5"):
            tree = ported_folder.open_part(home, name, parts[name])
            layouts.write_text_encoder(folder, name, parts[name], tree, names[name])
        for name in diffusers_folder.TOKENIZERS:
            diffusers_folder.copy_tokenizer(home / name, folder / name)
    return _card(
        weights,
        layout,
        config,
        text_length=weights.config.data.text_length,
        scheduler=scheduler,
        has_autoencoder=home is not None and layout != "lora",
        has_text=home is not None and layout == "diffusers",
        assumed=told,
        **more,
    )


def assumed(folder: Path) -> list[str]:
    """What was assumed of a network, or of the teacher that it comes from, when it was ported."""
    with contextlib.suppress(configuration.ConfigError):
        for found in ported_folders(str(folder)):
            return ported_folder.describe(found).get("assumed", [])
    return []
