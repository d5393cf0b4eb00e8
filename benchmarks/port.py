"""Port and export against `cp` of the same files, and the memory that they take.

python benchmarks/port.py            # 0.5 GB of random weights
python benchmarks/port.py --full     # FLUX.1-lite-8B in bfloat16: 16 GB, and three times that free

The last line is JSON: `ratio` is the speed of the slower of the two over that of `cp` (1 is as
fast), `peak_gb` the most memory that either took. What is read is not in the system's cache.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from flax import nnx

from jax_distill.interop import flux_config
from jax_distill.interop.diffusers_folder import DIFFUSERS_STEM
from jax_distill.interop.keys.transformer import TRANSFORMER_KEYS
from jax_distill.interop.readers import safetensors_files
from jax_distill.interop.tensors import Tensor
from jax_distill.models import mmdit
from jax_distill.storage.files import write_json

_FULL = flags.DEFINE_bool("full", False, "Whether to measure FLUX.1-lite-8B, in bfloat16.")
_FOLDER = flags.DEFINE_string("folder", None, "Where the files are made and removed; default: /tmp")

LITE = mmdit.MMDiTConfig(num_layers=8, num_single_layers=38, guidance_embeds=True)
SMALL = dataclasses.replace(
    LITE, num_layers=2, num_single_layers=6, num_attention_heads=8, joint_attention_dim=1024
)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def make(folder: Path, config: mmdit.MMDiTConfig, like: dict) -> int:
    """Writes random weights, sharded as on the hub; returns their bytes."""
    noise = np.random.default_rng(0).standard_normal(1 << 22).astype(BFLOAT16)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return Tensor(shape, BFLOAT16, lambda: np.resize(noise, shape))

    tensors = {name: tensor(shape) for name, shape in TRANSFORMER_KEYS.shapes(like).items()}
    write_json(folder / "config.json", flux_config.to_diffusers(config))
    safetensors_files.write_folder(folder, DIFFUSERS_STEM, tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def forget(folder: Path) -> None:
    """Makes the next reader of a folder's files go to the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copying(source: Path, target: Path) -> float:
    """Seconds that `cp` takes; the copy is removed."""
    forget(source)
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    seconds = time.perf_counter() - begun
    shutil.rmtree(target)
    return seconds


def measure(function: str, source: Path, target: Path) -> tuple[float, float]:
    """Seconds and peak memory (GB) of a function of the package, in a process of its own."""
    forget(source)
    module, name = function.rsplit(".", 1)
    program = f"""
import pathlib, resource, sys, time
from {module} import {name}
begun = time.perf_counter()
{name}(sys.argv[1], pathlib.Path(sys.argv[2]))
seconds = time.perf_counter() - begun
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
"""
    command = [sys.executable, "-c", program, source, target]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, peak = map(float, printed.split()[-2:])
    return seconds, peak


def main(argv: list[str]) -> None:
    del argv
    config = LITE if _FULL.value else SMALL
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as root:
        like = jax.eval_shape(lambda: mmdit.initial_parameters(config, nnx.Rngs(0)))
        needed = 3 * sum(leaf.size for leaf in jax.tree.leaves(like)) * BFLOAT16.itemsize
        if shutil.disk_usage(root).free < 1.1 * needed:
            raise app.UsageError(f"--folder: {1.1 * needed / 1e9:.0f} GB are needed there")
        source, copy, ported, exported = (Path(root) / name for name in "abcd")
        size = make(source, config, like)
        before = copying(source, copy)
        port = measure("jax_distill.runs.porting.port", source, ported)
        export = measure("jax_distill.runs.exporting.export", ported, exported)
        names = [path.name for path in source.glob("*.safetensors")]
        same = all(
            subprocess.run(["cmp", source / name, exported / "transformer" / name]).returncode == 0
            for name in names
        )
        shutil.rmtree(ported)  # room for the copy
        after = copying(source, copy)
    reference = (before + after) / 2
    ratios = {"port_ratio": reference / port[0], "export_ratio": reference / export[0]}
    line = {
        "benchmark": "port",
        "ratio": min(ratios.values()),
        "reference": "cp",
        **ratios,
        "peak_gb": max(port[1], export[1]),
        "port_seconds": port[0],
        "export_seconds": export[0],
        "cp_seconds": [before, after],
        "port_gb_per_sec": size / 1e9 / port[0],
        "same_files_after_both": same,
        "gb": size / 1e9,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    app.run(main)
