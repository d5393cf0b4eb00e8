"""From our networks to PyTorch's weights, with what it takes to draw with them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from absl import logging
from ml_collections import ConfigDict

from jax_distill import adapters, build, checkpoint, embedded, flow, pipeline, ported, worlds
from jax_distill import config as configuration
from jax_distill.files import made_whole, write_atomically
from jax_distill.interop import diffusers_folder, exported, lora_weights, model_card, time_scale
from jax_distill.interop.orbax_tree import StoredLeaf, open_tree
from jax_distill.interop.parts import tensors_of
from jax_distill.interop.safetensors_files import SHARD_BYTES
from jax_distill.interop.transformer_keys import TRANSFORMER_KEYS
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.models.mmdit import MMDiTConfig
from jax_distill.worlds.flux import parts_folder, ported_config, schedule_shift, scheduler_of
from jax_distill.worlds.shapes import preview_captions

EXAMPLES = 8  # captions whose embeddings stand beside the weights
_LARGEST_RESIDUAL = 0.02  # bfloat16 leaves a few thousandths
_STEPS = {"scm": 2, "meanflow": 4, "imm": 4}  # that the card's program takes


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
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a network for PyTorch, with a README.md, whole or not at all.

    Args:
      source: a workdir, a ported folder, or "embedded".
      output: must not exist.
      layout: one of `exported.LAYOUTS`.
      scale: time scale of the exported network; by default its own.
      shard_bytes: of the files of a diffusers folder.

    Raises:
      ValueError: the source has no network, it is damaged, the output exists, or the disk
        is full.
    """
    with made_whole(output) as partial:
        weights = _open(source)
        config, tree, residual = build.network_config(weights.config), weights.tree, None
        if scale is not None and scale != config.time_scale:
            config, tree, residual = _rescaled(config, tree, scale)
        objective = weights.config.objective.name
        if layout == "lora":
            if weights.teacher is None:
                raise ValueError(
                    f"--format=lora: '{source}' has no adapters, all of its parameters were"
                    " trained; use --format=diffusers"
                )
            exported.write_adapters(partial, config, objective, tree, weights.config.lora.rank)
        else:
            if weights.teacher is not None:
                tree = lora_weights.merged(tree, weights.config.lora.base == "int8")
            tensors = tensors_of(tree, TRANSFORMER_KEYS)
            exported.write_transformer(partial, layout, config, objective, tensors, shard_bytes)
        weights.check()
        if _world(weights.config) == "flux":
            card = _flux(weights, partial, layout, config, residual)
        else:
            card = _shapes(weights, partial, layout, config, residual)
        exported.write_scheduler(partial, card)
        if layout == "diffusers":
            kind = model_card.scheduler_config(card)["_class_name"]
            exported.write_index(partial, kind)
        (partial / "README.md").write_text(model_card.text(card))


def _world(config: ConfigDict) -> str:
    return config.get("world", "shapes")  # runs of the first versions do not say


def _open(source: str) -> Weights:
    """Finds the network; nothing but descriptions is read."""
    if source == pipeline.EMBEDDED:
        params, description = embedded.load("teacher")
        config = ConfigDict(description["config"])
        return Weights(config, jax.tree.map(StoredLeaf, params), lambda: None, None)
    folder = Path(source)
    config = ported_config(folder) if ported.is_ported(folder) else configuration.load(folder)
    if config.objective.name == "autoencoder":
        raise ValueError(f"--checkpoint: '{folder}' is the run of an autoencoder, not of a network")
    if ported.is_ported(folder):
        return Weights(config, open_tree(folder / "network"), lambda: None, folder)
    step = folder / "checkpoints" / str(checkpoint.complete_steps(folder)[0])
    averaged = open_tree(step / "state", ("ema",), checked=True)

    def check() -> None:
        """Compares with the checksum that was saved; the first versions saved none."""
        path = step / "progress" / "metadata"
        saved = json.loads(path.read_text())["checksums"] if path.exists() else {}
        found = sum(leaf.checksum() for leaf in jax.tree.leaves(averaged)) % 2**32
        if saved.get("ema", found) != found:
            raise ValueError(f"'{step}' is damaged: its checksums do not fit; remove that folder")

    beside = adapters.settings(config)
    if beside is None:
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


def _rescaled(
    config: MMDiTConfig, tree: dict[str, Any], scale: float
) -> tuple[MMDiTConfig, dict[str, Any], float]:
    """The network with its time embedders refitted for another scale, and the largest residual.

    Raises:
      ValueError: that scale is too small for the embedders' functions.
    """
    residuals = []
    for name in time_scale.EMBEDDERS:
        if name in tree:
            old = jax.tree.map(lambda leaf: leaf.read(), tree[name])
            refitted = time_scale.refit(config, old, scale)
            if refitted.residual > _LARGEST_RESIDUAL:
                raise ValueError(
                    f"--time_scale: an embedder of {scale:g} t cannot be that of"
                    f" {config.time_scale:g} t (it would differ by {refitted.residual:.1e}); only a"
                    " larger scale can be had"
                )
            residuals.append(refitted.residual)
            logging.info("%s: refitted for %g t, residual %.1e", name, scale, refitted.residual)
            tree = {**tree, name: jax.tree.map(StoredLeaf, refitted.embedder)}
    return dataclasses.replace(config, time_scale=scale), tree, max(residuals)


def _card(
    weights: Weights, layout: str, config: MMDiTConfig, residual: float | None, **world: Any
) -> model_card.Card:
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
        residual=residual,
        guidance=weights.config.evaluation.guidance,
        guidance_embeds=config.guidance_embeds,
        interval_embeds=config.interval_embeds,
        steps=_STEPS.get(weights.config.objective.name, weights.config.samples.teacher_steps),
        resolution=tuple(resolution),
        patch=build.PATCH,
        channels=config.in_channels,
        time_shift=shift,
        sampler={
            name: getattr(objective, name)
            for name in ("data_scale", "middle_angle", "time_max", "sampler")
            if hasattr(objective, name)
        },
        scores=_scores(weights),
        base=_base(weights) if layout == "lora" else None,
        **world,
    )


def _base(weights: Weights) -> model_card.Base:
    """What adapters are beside."""
    teacher = weights.teacher
    folder = "embedded" if teacher.folder is None else str(teacher.folder)
    if teacher.folder is not None and ported.is_ported(teacher.folder):
        where = f"the diffusers folder that '{folder}' was ported from"
    else:
        command = f"python -m jax_distill.export --checkpoint={folder} --output=FLUX"
        where = f"what `{command}` makes"
    inputs = ("guidance_embeds", "interval_embeds")
    return model_card.Base(
        where=where,
        rank=weights.config.lora.rank,
        int8=weights.config.lora.base == "int8",
        same_inputs=all(weights.config.model[key] == teacher.config.model[key] for key in inputs),
    )


def _scores(weights: Weights) -> dict[str, float]:
    """Scores by steps, of a run that has been evaluated."""
    path = weights.folder / "results.json" if weights.folder else None
    if path is None or not path.exists():
        return {}
    students = json.loads(path.read_text()).get("student", {})
    return {steps: result["score"] for steps, result in students.items()}


def _shapes(
    weights: Weights, folder: Path, layout: str, config: MMDiTConfig, residual: float | None
) -> model_card.Card:
    """Writes what belongs to a network of the shapes world; returns its card."""
    if layout != "lora":
        params, description = embedded.load("autoencoder")
        autoencoder = AutoencoderConfig.from_dict(description).to_dict()
        exported.write_autoencoder(folder, autoencoder, jax.tree.map(StoredLeaf, params))
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
    has_autoencoder = layout != "lora"  # which stands beside the base's weights
    return _card(
        weights, layout, config, residual, captions=captions, has_autoencoder=has_autoencoder
    )


def _flux(
    weights: Weights, folder: Path, layout: str, config: MMDiTConfig, residual: float | None
) -> model_card.Card:
    """Writes what belongs to a network of FLUX's world; returns its card."""
    scheduler = None
    try:
        scheduler = scheduler_of(str(weights.folder))
        home = parts_folder(str(weights.folder))
    except configuration.ConfigError:  # a transformer alone
        home = None
        method = weights.config.objective.name
        if "time_shift" in build.settings_of(build.OBJECTIVES[method]):
            tokens = build.token_shape(weights.config)[0]
            with weights.config.unlocked():
                weights.config.objective.time_shift = schedule_shift(scheduler, tokens)
    if home is not None:
        described = ported.describe(home)
        parts, names = (described[key] for key in ("parts", "names"))
    if home is not None and layout != "lora":
        tree = open_tree(home / "autoencoder")
        exported.write_autoencoder(folder, parts["autoencoder"], tree)
    if home is not None and layout == "diffusers":
        for name in ("clip", "t5"):
            tree = open_tree(home / name)
            exported.write_text_encoder(folder, name, parts[name], tree, names[name])
        for name in diffusers_folder.TOKENIZERS:
            diffusers_folder.copy(home / name, folder / name)
    return _card(
        weights,
        layout,
        config,
        residual,
        text_length=weights.config.data.text_length,
        scheduler=scheduler,
        has_autoencoder=home is not None and layout != "lora",
        has_text=home is not None and layout == "diffusers",
        assumed=_assumed(weights.folder),
    )


def _assumed(folder: Path) -> list[str]:
    """What was assumed of a network when it was ported."""
    return ported.describe(folder).get("assumed", []) if ported.is_ported(folder) else []
