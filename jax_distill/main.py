"""Train: `python -m jax_distill.main --config=configs/scm.py [--workdir=DIR] [--config.a.b=c]`."""

from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict

from jax_distill.assembly.resolution import validate
from jax_distill.devices import processes
from jax_distill.devices.signals import Interrupted, Signals
from jax_distill.runs import checks, commands, config_flag, experiment
from jax_distill.storage import lease, paths
from jax_distill.training import saving

_CONFIG = config_flag.define(
    "File of the configuration; --config.key=value changes one of its values."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; a run that is there goes on. Default: runs/<name>."
)
processes.define_flags()


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    if not isinstance(config, ConfigDict):
        raise ValueError(
            "--config: give a file such as configs/scm.py, whose get_config returns what"
            " jax_distill.config.base made"
        )
    config.unlock()
    config.lock()  # all of it: sections that were set as a whole are still open
    validate(config)
    workdir = paths.path(_WORKDIR.value or Path("runs") / config.name)
    processes.join()
    try:
        with Signals(interrupt=True):
            checks.check_workdir(workdir)
            with saving.explained(workdir), lease.of_run(workdir):
                checks.check(config, workdir)
                experiment.run(config, workdir)
    except Interrupted as stop:
        logging.info("%s; run the same command to go on", stop)


if __name__ == "__main__":
    commands.run(main)
