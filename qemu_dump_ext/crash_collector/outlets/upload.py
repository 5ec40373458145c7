"""Copies crashes to where an fsspec URL leads: object stores, sftp, another file system.

A crash is at `URL/GUEST/TIME-SIGNATURE/`, and complete there exactly when it has its `crash.json`,
which comes last and under another name first, when everything else has been confirmed. The store
says what is not uploaded yet, so that nothing is forgotten when the agent ends. What people made of
signatures is at `URL/.states-HOST.json`, and is uploaded again whenever it changes.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TypeVar

from qemu_dump_ext.crash_collector.config.settings import Upload
from qemu_dump_ext.crash_collector.outlets.destination import Destination, check_upload
from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.crash_collector.store.states import SignatureState, SignatureStates
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import DumpError, DumpWriteError, SourceError
from qemu_dump_ext.host_limits import start_needed_thread
from qemu_dump_ext.value import Value

_STOP_SECONDS = 2.0
_LOOK_SECONDS = 20.0
"""How often is looked whether people have changed a state."""
_STATES = "the states of signatures"
_HANGING_MAX = 8

_T = TypeVar("_T")

_logger = logging.getLogger(__name__)


class _Failure(Value):
    times: int
    due: float


class Uploader:
    """Uploads what the store has, in a thread of its own that may be left behind at any moment.

    Attributes:
        backlog: How many crashes are not uploaded yet.
        uploaded: How many were, since the start.
        failures: How many attempts failed, since the start.
    """

    def __init__(
        self,
        store: CrashStore,
        settings: Upload,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Look at the settings.

        Args:
            store: Whose crashes.
            settings: Where to.
            clock: Seconds.
            jitter: A number from 0 to 1; hosts that were refused at once must not come back at
                once.

        Raises:
            RequestError: No package for such URLs is installed.
        """
        check_upload(settings)
        self._store = store
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._failed: dict[str, _Failure] = {}
        self._states_there: Mapping[str, SignatureState] = {}
        self._attempts: list[threading.Thread] = []
        self._woken = threading.Event()
        self._ending = False
        # Not waited for by the interpreter: a server that says nothing keeps nobody up.
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self.backlog = 0
        self.uploaded = 0
        self.failures = 0

    def start(self) -> None:
        """Begin with what an earlier agent left."""
        start_needed_thread(self._thread, SourceError)

    def wake(self) -> None:
        """Look at the store: there is a new crash."""
        self._woken.set()

    def stop(self) -> None:
        """End; what is under way is begun again by the next agent, if it does not end soon."""
        self._ending = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def upload_due(self) -> float | None:
        """Upload every crash whose time has come, the oldest first.

        Returns:
            Seconds until the next one is tried again; None: none is left.
        """
        pending = self._pending()
        self._failed = {name: self._failed[name] for name in pending if name in self._failed}
        destination: Destination | None = None
        for name, upload in pending.items():
            if self._ending:
                return None
            if name in self._failed and self._failed[name].due > self._clock():
                continue
            try:
                destination = destination or self._within(lambda: Destination(self._settings))
                upload(destination)
            except Exception as error:  # noqa: BLE001 - each kind of URL has errors of its own
                if destination is not None:
                    destination.given_up.set()
                destination = None
                self._fail(name, error)
            else:
                self._failed.pop(name, None)
        if not self._failed:
            return None
        return max(0.0, min(failure.due for failure in self._failed.values()) - self._clock())

    def _pending(self) -> dict[str, Callable[[Destination], None]]:
        """Return what is not uploaded yet, by name, and what uploads it."""
        records = [record for record in self._store.records() if record.uploaded is None]
        records.sort(key=lambda record: record.time)
        self.backlog = len(records)
        pending: dict[str, Callable[[Destination], None]] = {
            record.id: partial(self._upload, record) for record in records
        }
        states = self._store.states()
        if states.known != self._states_there:
            pending[_STATES] = partial(self._upload_states, states)
        return pending

    def _upload_states(self, states: SignatureStates, destination: Destination) -> None:
        self._within(lambda: destination.put_states(states))
        self._states_there = states.known

    def _upload(self, record: CrashRecord, destination: Destination) -> None:
        facts = self._within(lambda: destination.put(self._store, record))
        with self._store.locked():
            # As it is now: people may have held it meanwhile.
            record = replace(self._store.record(record.id), uploaded=facts)
            self._store.update(record)
            if not self._settings.keep_dump and not record.held:
                self._store.remove_dump(record, f"uploaded to {facts.url}")
        self.uploaded += 1
        self.backlog -= 1
        _logger.info("%s is uploaded to %s", record.id, facts.url)

    def _within(self, work: Callable[[], _T]) -> _T:
        """Do it in a thread that is left behind when it takes too long."""
        self._attempts = [thread for thread in self._attempts if thread.is_alive()]
        if len(self._attempts) >= _HANGING_MAX:
            raise DumpWriteError(f"{_HANGING_MAX} attempts hang; one must end before the next")
        done: Future[_T] = Future()

        def attempt() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                done.set_exception(error)

        thread = threading.Thread(target=attempt, name="upload attempt", daemon=True)
        self._attempts.append(thread)
        start_needed_thread(thread, DumpWriteError)
        try:
            return done.result(self._settings.timeout)
        except TimeoutError as error:
            if done.done():  # the server's own
                raise
            seconds = self._settings.timeout
            raise DumpWriteError(f"not done within {seconds:g} s (timeout)") from error

    def _fail(self, name: str, error: Exception) -> None:
        known = self._failed.get(name)
        times = known.times + 1 if known else 1
        longest = min(self._settings.retry * 2.0 ** min(times - 1, 32), self._settings.retry_max)
        delay = longest * (1 + self._jitter()) / 2
        self._failed[name] = _Failure(times, self._clock() + delay)
        self.failures += 1
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        _logger.warning("cannot upload %s, tried again in %.0f s: %s", name, delay, reason)

    def _work(self) -> None:
        while not self._ending:
            self._woken.clear()
            mark = self._store.states_mark()
            try:
                pause = self.upload_due()
            except (DumpError, OSError) as error:
                _logger.warning("the store cannot be looked at: %s", error)
                pause = self._settings.retry
            self._wait(pause, mark)

    def _wait(self, seconds: float | None, mark: object) -> None:
        """Wait for a crash or the next attempt, or until people change a state, who wake nobody."""
        ends = math.inf if seconds is None else self._clock() + seconds
        while (left := ends - self._clock()) > 0 and self._store.states_mark() == mark:
            if self._woken.wait(min(left, _LOOK_SECONDS)):
                return
