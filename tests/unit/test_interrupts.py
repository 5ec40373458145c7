from __future__ import annotations

import signal
import threading

import pytest

from qemu_dump_ext.interrupts import leave_signals_to_main_thread, uninterrupted


def test_an_interrupt_is_raised_on_leaving():
    reached = []

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached


def test_the_mask_is_as_before():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with uninterrupted():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= {signal.SIGINT, signal.SIGTERM}
        with uninterrupted():
            pass
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_thread_takes_no_signal():
    masks = []

    def work():
        leave_signals_to_main_thread()
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD} <= masks[0]


def test_the_main_thread_keeps_its_signals():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    leave_signals_to_main_thread()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
