"""Compiled programs are found again at the next start, whatever happened to their files."""

import errno
import os
import threading
import warnings

import jax
import jax.numpy as jnp
import pytest
from absl import flags, logging
from absl.testing import flagsaver
from jax._src import compilation_cache, monitoring

from jax_distill.runs import program_cache
from jax_distill.storage import files

HIT, WRITTEN = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture
def said(monkeypatch):
    """The lines of the log."""
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where `use` keeps programs; JAX's own settings are as before afterwards."""
    program_cache.define_flag()
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    names += ("jax_persistent_cache_min_compile_time_secs",)
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(compilation_cache, "get_file_cache", compilation_cache.get_file_cache)
    jax.config.update("jax_compilation_cache_dir", None)
    with flagsaver.flagsaver(keep_compiled=True):
        yield tmp_path / "jax_distill" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def start(folder):
    """A start of a command with one program: what happened to it, as JAX tells."""

    def once(warnings_of_jax: int = 0) -> list[str]:
        jax.config.update("jax_compilation_cache_dir", None)
        program_cache.use()
        compilation_cache.reset_cache()
        told = []

        def listen(event, **_):
            told.append(event)

        def program_of_this_test(x):
            return jnp.sin(x) * 3

        x = jnp.arange(5.0)
        monitoring.register_event_listener(listen)
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                found = jax.jit(program_of_this_test)(x)
        finally:
            monitoring.unregister_event_listener(listen)
        assert abs(float(found[1]) - 2.5244) < 1e-3
        assert len(warned) == warnings_of_jax
        return [event for event in told if event in (HIT, WRITTEN)]

    return once


def the_program(folder):
    return next(folder.glob("jit_program_of_this_test-*"))


def test_a_program_is_compiled_at_the_first_start_alone(start, folder):
    assert start() == [WRITTEN]
    os.utime(the_program(folder), (1, 1))
    assert start() == [HIT]
    assert the_program(folder).stat().st_mtime > 1  # the time of use


@pytest.mark.parametrize("damage", ("cut", "empty", "zeros", "one bit", "another's"))
def test_a_damaged_program_is_replaced_in_the_same_start(start, folder, said, damage):
    start()
    file = the_program(folder)
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "zeros": bytes(len(whole)),
            "one bit": whole[:-1] + bytes([whole[-1] ^ 1]),
            "another's": whole[32:],
        }[damage]
    )
    assert start() == [WRITTEN]
    assert said == [f"'{file}' is damaged; its program is compiled anew and replaces it"]
    assert start() == [HIT]


def test_a_program_that_jax_cannot_read_is_replaced_too(start, folder):
    start()
    key = the_program(folder).name.removesuffix(".program")
    program_cache.Programs(folder).put(key, b"written whole, and no program")
    assert start(warnings_of_jax=1) == [WRITTEN]
    assert start() == [HIT]


def test_a_full_disk_is_said_once_and_leaves_nothing(folder, said, monkeypatch):
    folder.mkdir(parents=True)
    programs = program_cache.Programs(folder)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        programs.put("a", b"1")
        programs.put("b", b"2")
    assert said == [
        f"compiled programs cannot be written in '{folder}' (No space left on device); mend that"
        " or pass --nokeep_compiled"
    ]
    assert not list(folder.iterdir()) and programs.get("a") is None
    programs.put("a", b"3")  # there is room again
    assert programs.get("a") == b"3"


def test_a_folder_that_cannot_be_read_costs_compiling_alone(folder, said):
    (folder / "a.program").mkdir(parents=True)
    programs = program_cache.Programs(folder)
    assert programs.get("a") is None
    programs.put("a", b"1")
    assert len(said) == 1 and "cannot be read" in said[0] and "Is a directory" in said[0]


def test_a_kill_while_a_program_is_written_leaves_none(folder, monkeypatch):
    folder.mkdir(parents=True)
    programs = program_cache.Programs(folder)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        patch.setattr(files.Path, "unlink", killed)
        with pytest.raises(Killed):
            programs.put("a", b"1")
    assert programs.get("a") is None
    programs.put("a", b"2")
    assert programs.get("a") == b"2"


def test_two_processes_write_the_same_program_at_once(folder, monkeypatch):
    folder.mkdir(parents=True)
    ours, theirs = program_cache.Programs(folder), program_cache.Programs(folder)
    replace, found = os.replace, []

    def meanwhile(*paths):
        monkeypatch.setattr(files.os, "replace", replace)
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "getpid", lambda: 1)
            found.append(theirs.get("a"))
            theirs.put("a", b"theirs")
            found.append(theirs.get("a"))
        replace(*paths)

    monkeypatch.setattr(files.os, "replace", meanwhile)
    ours.put("a", b"ours")
    assert found == [None, b"theirs"]
    assert ours.get("a") == theirs.get("a") == b"ours"


def test_threads_of_a_server_write_the_same_program_at_once(folder, said):
    folder.mkdir(parents=True)
    programs = program_cache.Programs(folder)
    threads = [
        threading.Thread(target=programs.put, args=("a", bytes([number]) * 100_000))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(programs.get("a"))) == 1 and not said


def test_those_used_longest_ago_are_deleted(folder, monkeypatch):
    folder.mkdir(parents=True)
    monkeypatch.setattr(program_cache, "MOST_BYTES", 100 + 2 * 32)
    programs = program_cache.Programs(folder)
    (folder / "jit_f-cache").write_bytes(bytes(30))  # of JAX's own
    os.utime(folder / "jit_f-cache", (1, 1))
    for number, name in enumerate("ab"):
        programs.put(name, name.encode() * 30)
        os.utime(folder / f"{name}.program", (2 + number, 2 + number))
    assert programs.get("a")  # b is now the one used longest ago
    programs.put("c", b"c" * 40)
    assert sorted(path.name for path in folder.iterdir()) == ["a.program", "c.program"]


def test_the_folder_may_vanish(folder):
    programs = program_cache.Programs(folder)
    assert programs.get("a") is None
    programs.put("a", b"1")
    assert programs.get("a") == b"1"


def test_programs_are_kept_where_the_user_says(folder, monkeypatch, said):
    jax_has = compilation_cache.get_file_cache
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    program_cache.use()  # compiled anew
    assert said == [
        "'/dev/null/jax_distill/compiled' cannot be written; compiled programs are not kept"
    ]
    jax.config.update("jax_compilation_cache_dir", "/theirs")
    program_cache.use()
    assert jax.config.jax_compilation_cache_dir == "/theirs"
    assert compilation_cache.get_file_cache is jax_has
    with flagsaver.flagsaver(keep_compiled=False):
        program_cache.use()
    assert not jax.config.jax_enable_compilation_cache


def test_a_jax_without_a_place_for_it_compiles(folder, monkeypatch, said):
    monkeypatch.delattr(compilation_cache, "get_file_cache")
    program_cache.use()
    assert said == ["this JAX has no place for kept programs; they are compiled at each start"]
    assert jax.config.jax_compilation_cache_dir is None
