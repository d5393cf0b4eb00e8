"""Compiled programs, kept between starts of a command."""

import os
from pathlib import Path

import jax
from absl import flags, logging

MOST_BYTES = 2**31  # those used longest ago are deleted


def define_flag() -> None:
    """Defines the flag that `use` reads."""
    if "keep_compiled" in flags.FLAGS:  # where one program imports several commands
        return
    flags.DEFINE_boolean(
        "keep_compiled",
        True,
        "Keep compiled programs for the next start, in JAX_COMPILATION_CACHE_DIR, or in"
        " ~/.cache/jax_distill/compiled, which is kept below 2 GiB.",
    )


def use() -> None:
    """Has JAX read and keep compiled programs; before the first is compiled.

    A folder that the user has given JAX is used as the user has set it up. Where ours cannot be
    written, programs are compiled anew.
    """
    if not flags.FLAGS.keep_compiled:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir:
        return
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # there is no home
        writable = False
    if not writable:
        logging.info("'%s' cannot be written; compiled programs are not kept", folder)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    # A start compiles many programs, most of them in less than JAX's default of a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jax_distill" / "compiled"
