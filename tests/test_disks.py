"""Errors of disks are told apart, whoever raises them and however they are wrapped."""

import errno
import os
import socket

import pytest

from jax_distill.storage import disks

PASSING = [errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE]
PASSING += [errno.ENOMEM, errno.ETIMEDOUT, errno.EINTR, errno.ENOSPC, errno.EBUSY, errno.ENOTCONN]
OF_CONTENT = [errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP]


def raised(number):
    return OSError(number, os.strerror(number), "file")


def of_tensorstore(number):
    said = f"{os.strerror(number)} [os_error_code='{number}']"
    return ValueError(f'UNKNOWN: Error reading "a": Failed to open: "b": {said}')


def of_rust(number):
    return RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")


def of_tensorflow(number):
    return RuntimeError(f"a/events.out; {os.strerror(number)}")


def wrapped(number):
    error = Exception("Encountered error while reading array index")
    error.__cause__ = of_tensorstore(number)
    return error


def in_its_context(number):
    error = ValueError("x")
    error.__context__ = wrapped(number)
    return error


def in_a_group(number):
    return ExceptionGroup("several", [ValueError("x"), raised(number)])


KINDS = [raised, of_tensorstore, of_rust, of_tensorflow, wrapped, in_its_context, in_a_group]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_the_system_are_known_in_all_wrappings(kind):
    for number in PASSING:
        assert disks.passing(kind(number)) and disks.reason(kind(number)) == os.strerror(number)
    for number in OF_CONTENT:
        assert not disks.passing(kind(number))
    for number in disks.FULL:
        assert disks.full(kind(number)) == disks.FULL[number]
    for number in (errno.EIO, errno.ENOENT, errno.ENOMEM):
        assert disks.full(kind(number)) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError("no number"),
        TimeoutError(),
        ConnectionResetError(),
        ValueError("UNAVAILABLE: x"),
        ValueError("DEADLINE_EXCEEDED: x"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"),
    ],
)
def test_errors_without_a_number_pass_too(error):
    assert disks.passing(error) and disks.full(error) is None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("DATA_LOSS: CRC-32C checksum mismatch"),
        ValueError("OUT_OF_RANGE: Requested byte range [0, 9) is not valid"),
        FileNotFoundError("no number"),
        KeyError("ema"),
    ],
)
def test_what_is_said_of_content_does_not_pass(error):
    assert not disks.passing(error) and disks.full(error) is None


def test_a_loop_of_causes_ends():
    a, b = ValueError("a"), ValueError("b")
    a.__cause__, b.__cause__ = b, a
    assert list(disks.chain(a)) == [a, b]


def test_every_file_is_read_and_no_pipe(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    disks.read_all(tmp_path)
    (tmp_path / "a" / "c").symlink_to("/proc/self/mem")
    with pytest.raises(OSError) as found:
        disks.read_all(tmp_path)
    assert found.value.errno == errno.EIO


def test_a_host_that_is_not_found_has_no_number_of_the_system():
    error = socket.gaierror(-2, "Name or service not known")
    assert disks.passing(error) and not disks.full(error)
    assert disks.reason(error) == "[Errno -2] Name or service not known"
    wrapped = ValueError("no answer")
    wrapped.__cause__ = error
    assert disks.passing(wrapped) and disks.reason(wrapped) == "no answer"
