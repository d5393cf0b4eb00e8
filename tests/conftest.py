"""Compiling is most of what the tests do: programs are compiled quickly, and once in a session."""

import gc
import os
import shutil
import tempfile

import pytest

CACHE = "JAX_COMPILATION_CACHE_DIR"
# They halve the time of a core; every law holds of programs that are not optimised too.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config: pytest.Config) -> None:
    """Sets what workers, and commands in processes of their own, inherit."""
    if QUICK not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"
    if CACHE not in os.environ:
        os.environ[CACHE] = config.cache_made_here = tempfile.mkdtemp(prefix="compiled-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(getattr(config, "cache_made_here", ""), ignore_errors=True)


def pytest_collection_finish() -> None:
    """Collections of garbage, which every restore makes, pass over what the imports have left."""
    gc.collect()
    gc.freeze()
