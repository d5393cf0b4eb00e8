"""What all commands share: quiet libraries, and one clear sentence for what is wrong."""

import os
import sys
from collections.abc import Callable

from absl import app, logging

from jax_distill.train import NonFiniteLoss


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a command; what a user can mend ends it with `error: ...` and exit code 1."""
    try:
        app.run(_guarded(main), flags_parser=_parse)
    except (ValueError, NonFiniteLoss, OSError) as error:
        sys.exit(f"error: {error}")


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; unknown ones, and unknown or ill-typed configuration keys, end the command."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        # ml_collections' words: 'totl_steps' and, on a second line, what was perhaps meant.
        reason = str(error).strip("'\"").replace("\\n", "\n").replace("\\'", "'").strip("'")
        key, _, hint = reason.partition("\n")
        sys.exit(f"error: --config has no key {key.strip(chr(39))}. {hint}".rstrip())


def _guarded(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def command(argv):
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
        logging.set_verbosity(logging.INFO)
        logging.get_absl_handler().setFormatter(None)
        _quiet_libraries()
        main(argv)

    return command


def _quiet_libraries() -> None:
    """Leaves the terminal to our own lines: libraries log at INFO through the same logger."""
    own = os.path.dirname(__file__)
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno > 20 or record.pathname.startswith(own)
    )
