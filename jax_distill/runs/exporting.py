"""Export: from our networks to PyTorch's weights, with all that is needed to draw with them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from absl import logging
from ml_collections import ConfigDict

from jax_distill import flow, worlds
from jax_distill.assembly import build
from jax_distill.config import ConfigError
from jax_distill.evaluation.results import read_results
from jax_distill.interop import flux_config, layouts, ported_folder, scheduler_config, time_scale
from jax_distill.interop.cards import model_card, schedules
from jax_distill.interop.cards.card import Base, Card
from jax_distill.interop.keys.transformer import TRANSFORMER_KEYS
from jax_distill.interop.orbax_tree import StoredLeaf
from jax_distill.interop.parts import tensors_of
from jax_distill.interop.readers.safetensors_files import SHARD_BYTES
from jax_distill.interop.tensors import CHOICES
from jax_distill.models.mmdit import MMDiTConfig
from jax_distill.objectives.settings import settings_of
from jax_distill.runs.stored_network import StoredNetwork, open_network
from jax_distill.sampling import Sampler
from jax_distill.storage.files import write_atomically
from jax_distill.storage.outputs import made_whole
from jax_distill.storage.quoting import code, prose, word

EXAMPLES = 8  # captions whose embeddings stand beside the weights


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
      source: a workdir, a ported folder, or "embedded" for the bundled teacher.
      output: must not exist.
      layout: one of `layouts.LAYOUTS`.
      scale: time scale of the exported network; by default that of `layouts.factors`.
      dtype: of the network's tensors, a key of `CHOICES`.
      shard_bytes: of the files of a diffusers folder.

    Raises:
      ValueError: the source has no network, it is damaged, it cannot meet the needs of the layout's
        readers, the output exists, or the disk is full.
    """
    with made_whole(output) as partial:
        network = open_network(source)
        if layout == "lora" and network.teacher is None:
            raise ValueError(
                f"--format=lora: '{source}' has no adapters, all of its parameters were trained;"
                " use --format=diffusers"
            )
        if layout == "lora" and CHOICES[dtype] is not None:
            raise ValueError("--dtype: --format=lora has adapters in float32; leave it out")
        settings, world = network.config, worlds.of(network.config)
        own = build.network_config(settings)
        guidance = "cfg" if build.needs_null(settings) else "auto"
        purpose = flux_config.Purpose(
            settings.objective.name, guidance, _objective_settings(settings)
        )
        config = dataclasses.replace(own, **layouts.factors(layout, own, scale))
        refits = time_scale.refit_network(own, config, network.tree)
        embedders = {name: refit.embedder for name, refit in refits.items()}
        tree = network.tree if layout == "lora" else network.merged()
        tree = {**tree, **jax.tree.map(StoredLeaf, embedders)}
        tensors = {}
        if layout == "lora":
            layouts.write_adapters(partial, config, purpose, tree, settings.lora.rank)
        else:
            tensors = layouts.in_type(tensors_of(tree, TRANSFORMER_KEYS), CHOICES[dtype])
            layouts.write_transformer(partial, layout, config, purpose, tensors, shard_bytes)
        if layout == "diffusers" and refits:
            layouts.write_own_embedders(partial, own, purpose, network.tree)
        network.check()
        parts = {
            name: part for name in layouts.LAYOUTS[layout] if (part := world.part(name)) is not None
        }
        for name, part in parts.items():
            layouts.write_pipeline_part(partial, name, part)
        card = _card(
            network,
            world,
            config,
            layout=layout,
            dtype=layouts.types(tensors),
            refits=refits,
            captions=_write_examples(partial, world),
            has_autoencoder="autoencoder" in parts,
            has_text="clip" in parts,
            base=_base(network) if layout == "lora" else None,
        )
        layouts.write_scheduler(partial, schedules.scheduler_config(card))
        if layout == "diffusers":
            if config.interval_embeds:
                layouts.write_flow_map(partial, schedules.start(card))
            layouts.write_index(partial, flow_map=config.interval_embeds)
        write_atomically(partial / "README.md", model_card.text(card))


def _objective_settings(config: ConfigDict) -> str:
    """A student's settings, for `flux_config.Purpose`."""
    name = config.objective.name
    if name in build.TEACHERS:
        return ""
    whole = {**settings_of(build.OBJECTIVES[name]), **config.objective}
    del whole["name"]
    return json.dumps(whole, sort_keys=True)


def _card(network: StoredNetwork, world: worlds.World, config: MMDiTConfig, **more: Any) -> Card:
    """The card of a network that is exported with the embedders of `config`."""
    settings = network.config
    method = build.without_networks(settings)
    sampler, scheduler, assumed = _sampling(settings, world)
    steps = method.card_steps or settings.samples.teacher_steps
    return Card(
        name=settings.name or "network",
        method=method.name,
        summary=method.summary,
        time_scale=config.time_scale,
        guidance_factor=config.guidance_factor,
        guidance=settings.evaluation.guidance,
        guidance_embeds=config.guidance_embeds,
        guided=build.needs_null(settings),
        interval_embeds=config.interval_embeds,
        steps=min(steps, sampler.schedule.most_steps),
        resolution=tuple(world.resolution),
        patch=build.PATCH,
        channels=config.in_channels,
        sampler=sampler,
        text_length=settings.data.text_length,
        scheduler=scheduler,
        scores=_scores(network.folder),
        assumed=assumed,
        **more,
    )


def _sampling(
    config: ConfigDict, world: worlds.World
) -> tuple[Sampler, Mapping[str, Any] | None, list[str]]:
    """How the network is drawn from, diffusers' scheduler of it, and sentences on assumptions.

    The scheduler is None where the method has a schedule of its own.
    """
    scheduler, assumed = None, list(world.assumed)
    tokens = build.token_shape(config)[0]
    if build.follows_world(config):
        try:
            scheduler = world.scheduler
        except ConfigError:  # the folder that it was ported from is gone
            scheduler = scheduler_config.FLUX_DEV
            with config.unlocked():
                config.objective.time_shift = flow.flux_shift(tokens)
            words = "the schedule is FLUX.1-dev's, since the folder that it was ported from is gone"
            logging.warning("assumed: %s", words)
            assumed.append(words)
    sampler = build.objective(config).sampled_by
    schedule = sampler.schedule.at(tokens)
    if schedule != sampler.schedule:  # FLUX's own, in a world without one
        scheduler = scheduler_config.FLUX_DEV
    return sampler._replace(schedule=schedule), scheduler, assumed


def _write_examples(folder: Path, world: worlds.World) -> list[str]:
    """Writes embedded captions for readers without the world's encoder; returns the captions."""
    captions = world.examples(EXAMPLES)
    if captions:
        text, null = world.encode(captions), world.null
        examples = {
            "sequence": text.sequence,
            "pooled": text.pooled,
            "null_sequence": null.sequence,
            "null_pooled": null.pooled,
        }
        examples = {name: np.ascontiguousarray(x, np.float32) for name, x in examples.items()}
        write_atomically(folder / "examples.safetensors", safetensors.numpy.save(examples))
    return captions


def _base(network: StoredNetwork) -> Base:
    """The network beside which adapters belong."""
    teacher = network.teacher
    folder = "embedded" if teacher.folder is None else str(teacher.folder)
    if teacher.folder is not None and ported_folder.is_ported(teacher.folder):
        where = f"the diffusers folder that '{prose(folder)}' was ported from"
    else:
        command = f"python -m jax_distill.export --checkpoint={word(folder)} --output=FLUX"
        where = f"what {code(command)} makes"
    inputs = ("guidance_embeds", "interval_embeds")
    return Base(
        where=where,
        rank=network.config.lora.rank,
        int8=network.config.lora.base == "int8",
        same_inputs=all(network.config.model[key] == teacher.config.model[key] for key in inputs),
    )


def _scores(folder: Path | None) -> dict[int, float]:
    """Scores by steps, of a run that has been evaluated."""
    found = read_results(folder / "results.json") if folder else None
    return {} if found is None else {steps: x.score for steps, x in found.student.items()}
