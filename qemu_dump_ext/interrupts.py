"""Keep interrupts out of moments and threads that cannot bear them.

Works in gdb as well, whose own handler of SIGINT must not be replaced: signals are only masked.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back interrupts of this thread; one that came meanwhile is raised on leaving."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    early = None
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    except KeyboardInterrupt as error:  # it had come before; they are held back all the same
        early = error
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if early is not None:
            raise early


def leave_signals_to_main_thread() -> None:
    """Begin a thread with this: a signal then reaches, and wakes, the thread that handles it.

    The main thread, where it does such work itself, keeps its signals; it would be deaf to them for
    good, and so would every process that it starts.
    """
    if threading.current_thread() is threading.main_thread():
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
