"""Ctrl-C while workers train."""

import signal
import sys

import pytest

from hashdist.stages.cluster.workers import _interrupted_by_us


@_interrupted_by_us()
def train_until_interrupted() -> None:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))  # as Ray Train does
    signal.raise_signal(signal.SIGINT)


def test_what_ray_train_makes_of_an_interrupt_is_one_again_and_its_handler_goes() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_until_interrupted()
    assert signal.getsignal(signal.SIGINT) is before
    with _interrupted_by_us():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before
