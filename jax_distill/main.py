"""Train: `python -m jax_distill.main --config=configs/scm.py [--workdir=DIR] [--config.a.b=value]`."""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from jax_distill import experiment
from jax_distill.train import Interrupted, NonFiniteLoss

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the configuration.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; a run that is there is resumed. Default: runs/<name>."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.INFO)
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or Path("runs") / config.name)
    try:
        experiment.run(config, workdir)
    except Interrupted as stop:
        logging.info("%s; run the same command to go on", stop)
    except (ValueError, NonFiniteLoss) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
