"""Compare: `python -m jax_distill.study --config=configs/study.py [--workdir=DIR]`.

Every cell of the study is a run of `jax_distill.main`, of one method with one seed, in a folder of
its own; all share the data and the time-rescaled teacher, which the study makes first. A finished
cell is kept, one that was stopped goes on: run the same command again.
"""

from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict

from jax_distill.devices.signals import Interrupted, Signals
from jax_distill.runs import cells, commands, config_flag, study_settings
from jax_distill.storage import lease, paths

_CONFIG = config_flag.define("File of the study's configuration.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where it lives. Default: runs/<name>.")


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    if not isinstance(config, ConfigDict) or "rows" not in config:
        raise ValueError("--config: give a study's file, such as configs/study.py")
    study_settings.check(config)
    try:
        with Signals(interrupt=True):
            workdir = paths.path(_WORKDIR.value or Path("runs") / config.name)
            if paths.is_bucket(workdir):
                raise ValueError(
                    f"--workdir: '{workdir}' is in a bucket, and studies live on a disk, where they"
                    " compare their runs; give a folder"
                )
            with lease.of_folder(workdir):
                cells.run(config, workdir)
    except Interrupted as stop:
        logging.info("%s; run the same command to go on", stop)


if __name__ == "__main__":
    commands.run(main)
