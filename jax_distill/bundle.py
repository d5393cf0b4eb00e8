"""Bundle: `python -m jax_distill.bundle --run=runs/teacher` bundles a run's weights."""

import json
from pathlib import Path

from absl import flags

from jax_distill import config as configuration
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.runs import commands
from jax_distill.storage.files import read_json
from jax_distill.training import checkpoint
from jax_distill.worlds.shapes import bundled

_RUN = flags.DEFINE_string("run", None, "Workdir of configs/autoencoder.py or configs/teacher.py.")


def main(argv: list[str]) -> None:
    del argv
    run = Path(_RUN.value)
    config = configuration.load(run)
    params = checkpoint.load_averaged(run)
    if config.objective.name == "autoencoder":
        name, path = "autoencoder", run / "autoencoder.json"
        try:
            description = read_json(path)
            AutoencoderConfig.from_dict(description)
        except FileNotFoundError:
            message = f"'{path}' is missing; train configs/autoencoder.py to its end"
            raise ValueError(message) from None
    else:
        name, params = "teacher", params["network"]
        description = {"config": json.loads(config.to_json_best_effort())}
    bundled.save(name, params, description)
    print(f"wrote {bundled.FOLDER / name}.safetensors")


if __name__ == "__main__":
    flags.mark_flag_as_required("run")
    commands.run(main)
