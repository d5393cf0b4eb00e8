"""Compiling is most of what the tests do: programs are compiled quickly, and once in a session."""

import gc
import os
import shutil
import tempfile
import types

import pytest
from absl import logging

import jax_distill  # noqa: F401 - its settings of libraries come before they are imported

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


@pytest.fixture
def warned(monkeypatch):
    """The lines of warnings."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture(scope="session")
def store():
    """A store of objects, see `bucket_server`, which all that reads buckets takes for Google's."""
    pytest.importorskip("gcp_storage_emulator", reason="pip install 'jax-distill[test]'")
    pytest.importorskip("gcsfs", reason="pip install 'jax-distill[gcs]'")
    from bucket_server import BucketServer, environment

    with BucketServer() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(running.port).items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def faults(store):
    """What goes wrong with the next requests: each must have happened when the test ends."""
    yield store.faults
    left, store.faults.next = store.faults.next, []
    assert not left, f"faults that no request had: {left}"


@pytest.fixture
def bucket(faults, request, monkeypatch):
    """A folder of the bucket; gcsfs tries again at once."""
    from gcsfs import retry

    from jax_distill.storage import paths

    async def sleep(seconds):
        pass

    monkeypatch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=sleep))
    return paths.path(f"gs://test/{request.node.name}")
