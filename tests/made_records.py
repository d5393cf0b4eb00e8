"""Folders of records of given content, made as `prepare` makes them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from jax_distill.data import shards
from jax_distill.data.encoding import distinct
from jax_distill.data.making import Making
from jax_distill.data.manifest import CAPTIONS, LATENTS
from jax_distill.data.records import LatentRecord
from jax_distill.flow import Text


def write(
    path: Path,
    records: Iterable[LatentRecord],
    facts: Mapping[str, Any] | None = None,
    *,
    null: Text | None = None,
    padding: str = "kept",
    rows: Mapping[str, int] | None = None,
    shard_records: int = 1024,
) -> Path:
    """Makes a folder of records.

    Args:
      path: of the folder.
      records: in order; the first tells the shapes.
      facts: others than those.
      null: the empty caption, with embedded captions.
      padding: see `manifest.TextFacts`.
      rows: of the sequences that are stored, by caption; all by default.
      shard_records: records of a shard.
    """
    records = list(records)
    numbers, captions = distinct([record.caption for record in records])
    latents = records[0].latents
    facts = {**(facts or {})}
    facts["latents"] = {"shape": list(latents.shape), "type": latents.dtype.name}
    if null is not None:
        (_, *sequence), (_, pooled) = (leaf.shape for leaf in null)
        kind = null.sequence.dtype.name
        facts["text"] = {"sequence": sequence, "pooled": pooled, "type": kind, "padding": padding}
    firsts = {record.caption: record for record in reversed(records)}

    def caption(number: int) -> dict[str, Any]:
        record = firsts[captions[number]]
        own = (rows or {}).get(record.caption)
        fields = {"caption": record.caption, "pooled": record.pooled}
        fields["sequence"] = record.sequence if own is None else record.sequence[:own]
        return {name: value for name, value in fields.items() if value is not None}

    def example(index: int) -> dict[str, Any]:
        record = records[index]
        return {"key": record.key, "caption": numbers[index], "latents": record.latents}

    making = Making(path, facts)
    if null is not None:
        making.write_null(lambda: null)
    sizes = {"SHARD_RECORDS": shard_records}
    with mock.patch.multiple(shards, **sizes):
        for kind, count, fields in (
            (CAPTIONS, len(captions), caption),
            (LATENTS, len(records), example),
        ):
            making.write(kind, count, 1, 1, lambda f=fields: lambda span: [f(i) for i in span])
    making.finish({}, {})
    making.forget()
    return path


def some(count: int, text: Text | None = None) -> list[LatentRecord]:
    """Random records of captions that differ; embedded ones with the shapes of `text`."""
    rng = np.random.default_rng(0)

    def like(leaf: np.ndarray) -> np.ndarray:
        return rng.standard_normal(leaf.shape[1:]).astype(leaf.dtype)

    return [
        LatentRecord(
            rng.standard_normal((4, 8)).astype(np.float16),
            f"caption {index}, a roté cercle",
            f"pictures/{index}.png",
            *(map(like, text) if text is not None else ()),
        )
        for index in range(count)
    ]
