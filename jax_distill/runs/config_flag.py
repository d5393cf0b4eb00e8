"""The flag --config, a file that has `get_config`, and --config.key=value, which changes it."""

import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags.tuple_parser import TupleParser

from jax_distill.config import ConfigError
from jax_distill.config.settings import Misspelt, WrongType, no_such_key

flags.disclaim_key_flags()  # --config belongs to the module that calls `define`


class Mistake(Exception):
    """A configuration file or a change of it that cannot be used; the message says why.

    It is no ValueError, which absl would put into a sentence of its own.
    """


def define(description: str) -> flags.FlagHolder[ConfigDict]:
    """Defines --config; its value is what the file's `get_config` returns, changed and locked."""
    return flags.DEFINE(_File(), "config", None, description, serializer=flags.ArgumentSerializer())


def parse(argv: list[str]) -> list[str]:
    """Parses the flags of a command, and those that change its configuration; their order is free.

    Returns:
      The arguments that are no flags.

    Raises:
      Mistake, flags.Error: a flag cannot be used.
    """
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    changes = [arg for arg in argv[1:] if re.match(r"--?(?:no)?config\.", arg)]
    rest = flags.FLAGS([arg for arg in argv if arg not in changes])
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    if changes and config is None:
        first = changes[0].partition("=")[0]
        raise Mistake(f"--config is missing beside {first}; such as --config=configs/scm.py")
    for change in changes:
        _apply(config, change)
    return rest


def read(file: str, changes: Iterable[str]) -> ConfigDict:
    """The configuration of a file, changed as the command line does.

    Args:
      file: "FILE" or "FILE:PRESET".
      changes: such as "seed=3".

    Raises:
      ConfigError: the file or a change cannot be used.
    """
    try:
        config = _File().parse(file)
        for change in changes:
            _apply(config, f"--config.{change}")
    except Mistake as mistake:
        raise ConfigError(str(mistake)) from None
    return config


class _File(flags.ArgumentParser):
    """Reads "FILE" or "FILE:PRESET"."""

    def parse(self, argument: str) -> Any:
        path, *preset = argument.split(":", 1)
        if not Path(path).is_file():
            raise Mistake(f"--config: there is no file '{path}'")
        scope: dict[str, Any] = {"__name__": "config", "__file__": path}
        try:
            exec(compile(Path(path).read_bytes(), path, "exec"), scope)
            if "get_config" not in scope:
                raise ConfigError(f"--config: '{path}' has no function get_config(preset='')")
            config = scope["get_config"](*preset)
        except ConfigError as error:
            raise Mistake(str(error)) from error
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f", line {frame.lineno}" for frame in frames if frame.filename == path]
            kind = "" if isinstance(error, Misspelt | WrongType) else f"{type(error).__name__}: "
            raise Mistake(f"{path}{''.join(lines[-1:])}: {kind}{error}") from error
        return config.lock() if isinstance(config, ConfigDict) else config


def _apply(config: Any, change: str) -> None:
    """Makes a change such as "--config.seed=3"."""
    name, given, text = change.partition("=")
    *sections, key = name.partition(".")[2].split(".")
    if not given:
        raise Mistake(f"{name}: give a value after '=', such as --config.seed=3")
    for part in (*sections, key):
        if not isinstance(config, ConfigDict) or part not in config:
            raise Mistake(f"{name}: {no_such_key(part, config)}")
        section, config = config, config[part]
    kind = section.get_type(key)
    if kind not in _KINDS:
        raise Mistake(f"{name}: it is a section; set its keys one by one")
    parser, words = _KINDS[kind]
    try:
        section[key] = parser(text)
    except ValueError:
        raise Mistake(f"{change}: {words}") from None


_KINDS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (flags.BooleanParser().parse, "neither true nor false"),
    int: (flags.IntegerParser().parse, "not a whole number"),
    float: (float, "not a number"),
    str: (str, ""),
    tuple: (TupleParser().parse, "not a list such as 1,2"),
}
"""How values of a type are read, and why one was not."""
