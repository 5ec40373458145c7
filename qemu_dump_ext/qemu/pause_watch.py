"""Two threads beside a pause: a clock for its limit, and a look-out for what others do.

Whatever the thread waits for that reads the guest (a full pipe, a command, QEMU itself): the
guest is let run first, and then that thread is interrupted, as by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Protocol

from qemu_dump_ext.errors import DumpError, SourceError
from qemu_dump_ext.host_limits import start_needed_thread, start_thread
from qemu_dump_ext.interrupts import leave_signals_to_main_thread

_LOOK_SECONDS = 0.5
_RELEASE_SECONDS = 1.0
_INTERRUPTS_MAX = 10
_AGAIN_SECONDS = 2.0


class Endable(Protocol):
    """A pause that can end before its time."""

    ended_by: DumpError | None


class PauseWatch:
    """Ends a pause that is over, or worth nothing any more."""

    def __init__(
        self,
        release: Callable[[float], None],
        look: Callable[[], DumpError | None],
        on_limit: Callable[[], DumpError] | None,
        *,
        deadline: float | None,
        is_patient: bool,
    ) -> None:
        """Prepare.

        Args:
            release: Lets the guest run if that is up to us, within so many seconds.
            look: Returns why the pause is over, or None; asks QEMU.
            on_limit: Returns what is raised at the deadline; None: there is none.
            deadline: In seconds of `time.monotonic`.
            is_patient: QEMU can be asked from another thread.
        """
        self._release = release
        self._look = look
        self._on_limit = on_limit
        self._deadline = deadline
        self._is_patient = is_patient
        self._over = threading.Event()
        self._interrupting = threading.Lock()
        self._owner = threading.current_thread()

    def start_clock(self, pause: Endable) -> None:
        """Begin to wait for the deadline; what ends `pause` is noted in it."""
        if self._on_limit is None or self._deadline is None:
            return
        start_needed_thread(
            self._thread(lambda: self._wait_for_limit(pause)),
            SourceError,
            what="a thread that watches over the pause",
        )

    def start_looking(self, pause: Endable) -> None:
        """Begin to look, where QEMU can be asked; the guest stands still."""
        if self._is_patient:
            start_thread(self._thread(lambda: self._look_out(pause)))

    def end(self) -> None:
        """Interrupt nobody from now on; harmless when repeated."""
        with self._interrupting:
            self._over.set()

    def _thread(self, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            leave_signals_to_main_thread()
            work()

        return threading.Thread(target=run, name="pause", daemon=True)

    def _wait_for_limit(self, pause: Endable) -> None:
        if self._on_limit is None or self._deadline is None:
            return
        if not self._over.wait(max(0.0, self._deadline - time.monotonic())):
            self._break(pause, self._on_limit())

    def _look_out(self, pause: Endable) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            try:
                problem = self._look()
            except SourceError:
                continue  # who reads the guest is told the same
            if problem is not None:
                self._break(pause, problem)
                return

    def _break(self, pause: Endable, error: DumpError) -> None:
        with self._interrupting:
            if self._over.is_set() or pause.ended_by is not None:
                return
            pause.ended_by = error
        if self._is_patient:
            with contextlib.suppress(SourceError):
                self._release(_RELEASE_SECONDS)
        if self._owner is not threading.main_thread():
            return  # which looks by itself, between two pieces of memory
        for _ in range(_INTERRUPTS_MAX):
            with self._interrupting:
                if self._over.is_set():
                    return
                signal.pthread_kill(self._owner.ident or 0, signal.SIGINT)
            # Again: gdb gives a connection up at the second one.
            self._over.wait(_AGAIN_SECONDS)
