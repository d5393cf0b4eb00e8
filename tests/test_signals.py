"""A signal ends what a process is doing, wherever it comes."""

import os
import signal
import time
import weakref

import pytest

from jax_distill.devices.signals import Interrupted, Signals


class Thing:
    pass


def test_a_signal_that_a_finalizer_swallows_comes_again():
    thing = Thing()
    keep = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted), Signals(interrupt=True):
        del thing  # Python ignores what is raised in here
        for _ in range(500):
            time.sleep(0.01)
    assert keep() is None


def test_signals_are_noted_and_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            if signals.received:
                break
            time.sleep(0.01)
    assert signals.received and signal.getsignal(signal.SIGTERM) is before
