"""How fast batches of prepared records are read, and in how much memory; one JSON line at the end.

    python benchmarks/data.py [--examples=256] [--batch_size=16] [--repeats=3] [--folder=DIR]

Records have the shapes of FLUX at 512 px: latents (1024, 64) float16, T5 (512, 4096) and CLIP
(768,) in bfloat16, for captions of 20 to 120 tokens. They are stored in both ways: with all rows of
T5's ("kept"), and with those of the caption alone ("shared"). In turn, over the same records,
examples a second are measured of

    bytes   the stored bytes of examples and captions read by two threads, and nothing made of them
    ours    batches of `jax_distill.data.loader`, read by two threads
    torch   `torch.utils.data.DataLoader` with two workers, whose data set is `LatentRecords`

Figures are medians of the repeats, an epoch each. Memory is the largest of this process in each of
three epochs of ours. `ratio` is ours over bytes of shared padding; files are in the page cache.
"""

import gc
import json
import re
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import app, flags

from jax_distill.data.loader import Ahead, EmbeddedLatents, batches
from jax_distill.data.making import Making
from jax_distill.data.manifest import CAPTIONS, LATENTS
from jax_distill.data.mixture import Mixture, Part
from jax_distill.data.records import LatentRecords
from jax_distill.flow import Text

_EXAMPLES = flags.DEFINE_integer("examples", 256, "Records of each kind.", 32)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Examples of a batch.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Epochs of each that are timed.", 1)
_FOLDER = flags.DEFINE_string("folder", None, "Where records are made; by default a temporary one.")

TOKENS, CHANNELS, LENGTH, WIDTH, POOLED = 1024, 64, 512, 4096, 768
FEWEST, MOST = 20, 120  # tokens of a caption
CORES, EPOCHS = 2, 3
TILES = 1024
SEED = 0


def lengths(count: int) -> np.ndarray:
    """Tokens of captions."""
    return np.random.default_rng(1).integers(FEWEST, MOST + 1, count)


def make(folder: Path, count: int, padding: str) -> None:
    """Makes a folder of records of random numbers."""
    text = {"sequence": [LENGTH, WIDTH], "pooled": POOLED, "type": "bfloat16", "padding": padding}
    latents = {"shape": [TOKENS, CHANNELS], "type": "float16"}
    facts = {"world": "flux", "resolution": [512, 512], "latents": latents, "text": text}
    making = Making(folder, facts)

    def normal(number: int, *shape: int) -> np.ndarray:
        return np.random.default_rng(number).standard_normal(shape, np.float32)

    def examples(span: range) -> list[dict]:
        return [
            {
                "key": str(n),
                "caption": n,
                "latents": normal(n, TOKENS, CHANNELS).astype(np.float16),
            }
            for n in span
        ]

    def captions(span: range) -> list[dict]:
        rows = [LENGTH if padding == "kept" else int(lengths(count)[n]) for n in span]
        return [
            {
                "caption": f"caption {n}",
                "sequence": normal(n, own, WIDTH).astype(ml_dtypes.bfloat16),
                "pooled": normal(n, POOLED).astype(ml_dtypes.bfloat16),
            }
            for n, own in zip(span, rows)
        ]

    making.write(CAPTIONS, count, 8, WIDTH * LENGTH * 2, lambda: captions)
    making.write(LATENTS, count, 8, TOKENS * CHANNELS * 2, lambda: examples)
    null = Text(
        normal(count, 1, LENGTH, WIDTH).astype(ml_dtypes.bfloat16),
        normal(count, 1, POOLED).astype(ml_dtypes.bfloat16),
    )
    making.write_null(lambda: null)
    making.finish({}, {})


class Bytes:
    """The stored bytes of every example and its caption."""

    def __init__(self, records: LatentRecords):
        self._sources = records._examples._source, records._captions._shards._source
        self._count, self._pool = len(records), ThreadPoolExecutor(CORES)

    def epoch(self) -> float:
        order = np.random.default_rng(SEED).permutation(self._count)
        parts = [part.tolist() for part in np.array_split(order, 4 * CORES)]
        begun = time.perf_counter()
        list(self._pool.map(self._read, parts))
        return time.perf_counter() - begun

    def _read(self, indices: list[int]) -> int:
        return sum(len(source[index]) for index in indices for source in self._sources)


class Tiled(EmbeddedLatents):
    """The records again and again: grain takes long to shuffle fewer than 2^16 examples."""

    def __init__(self, records: LatentRecords):
        super().__init__(records)
        self._count = len(records)

    def __len__(self) -> int:
        return TILES * self._count

    def fill(self, batch, row, index, held, dropped):
        return super().fill(batch, row, index % self._count, held, dropped)


class Ours:
    def __init__(self, records: LatentRecords, size: int):
        source = Mixture([Part(Tiled(records))])
        self._steps = len(records) // size
        self._stream = batches(source, size, SEED, ahead=Ahead(CORES, CORES))

    def epoch(self) -> float:
        for _ in range(4 * CORES):  # what was read before the clock begins
            next(self._stream)
        begun = time.perf_counter()
        for _ in range(self._steps):
            next(self._stream)
        return time.perf_counter() - begun


class Torch:
    def __init__(self, records: LatentRecords, size: int):
        import torch

        class Records(torch.utils.data.Dataset):
            def __len__(self):
                return len(records)

            def __getitem__(self, index):
                record = records[index]
                sequence, pooled = (
                    torch.from_numpy(np.array(leaf).view(np.int16)).view(torch.bfloat16)
                    for leaf in (record.sequence, record.pooled)
                )
                return torch.from_numpy(record.latents.astype(np.float32)), sequence, pooled

        self._loader = torch.utils.data.DataLoader(
            Records(),
            batch_size=size,
            shuffle=True,
            num_workers=CORES,
            persistent_workers=True,
            drop_last=True,
        )

    def epoch(self) -> float:
        begun = time.perf_counter()
        for _ in self._loader:
            pass
        return time.perf_counter() - begun


def peak_mib() -> float:
    """The largest resident memory since the last call, in MiB."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def measure(folder: Path, count: int, size: int) -> dict[str, float]:
    """The figures of a folder."""
    records = LatentRecords(folder)
    readers = {
        "torch": Torch(records, size),  # first, so that its workers are forked from little
        "bytes": Bytes(records),
        "ours": Ours(records, size),
    }
    for reader in readers.values():
        reader.epoch()
    found: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(_REPEATS.value):
        for name, reader in readers.items():
            found[name].append(count // size * size / reader.epoch())
    figures = {f"{name}_per_sec": statistics.median(rates) for name, rates in found.items()}
    ours = readers.pop("ours")
    readers.clear()
    gc.collect()
    peaks = []
    peak_mib()
    for _ in range(EPOCHS):
        ours.epoch()
        peaks.append(peak_mib())
    stored = sum(file.stat().st_size for file in folder.glob(f"{CAPTIONS}-*"))
    return {
        **figures,
        "ratio": figures["ours_per_sec"] / figures["bytes_per_sec"],
        "torch_ratio": figures["ours_per_sec"] / figures["torch_per_sec"],
        "peak_mib": max(peaks),
        "peak_growth": max(peaks) / min(peaks) - 1,
        "bytes_a_caption": stored / count,
        "stored_share": stored / count / (LENGTH * WIDTH * 2),
    }


def main(argv):
    del argv
    count, size = _EXAMPLES.value, _BATCH_SIZE.value
    with tempfile.TemporaryDirectory() as temporary:
        found = {}
        for padding in ("kept", "shared"):
            folder = Path(_FOLDER.value or temporary, padding)
            make(folder, count, padding)
            found[padding] = measure(folder, count, size)
            print(f"{padding}: {json.dumps(found[padding])}", flush=True)
    line = {
        "benchmark": "data",
        **found["shared"],
        "reference": "examples a second of reading the stored bytes alone",
        "kept": found["kept"],
        "examples": count,
        "batch_size": size,
        "cores": CORES,
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    app.run(main)
