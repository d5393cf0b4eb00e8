"""Train: `python -m jax_distill.main --config=configs/scm.py [--workdir=DIR] [--config.a.b=c]`."""

import sys
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from jax_distill import commands, experiment

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the configuration.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; a run that is there is resumed. Default: runs/<name>."
)


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or Path("runs") / config.name)
    try:
        experiment.run(config, workdir)
    except experiment.Interrupted as stop:
        logging.info("%s; run the same command to go on", stop)


if __name__ == "__main__":
    if not any(argument.lstrip("-").startswith("config") for argument in sys.argv):
        flags.mark_flag_as_required("config")
    commands.run(main)
