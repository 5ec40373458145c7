"""Tells people of crashes: a command is run, or a webhook called, until it has worked.

What is still to be told is in the store, in `.notifications.json`, so that nothing is forgotten
when the agent ends.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, TypeAdapter

from qemu_dump_ext.crash_collector.config.settings import Notification
from qemu_dump_ext.crash_collector.record import CrashRecord, reason_of
from qemu_dump_ext.crash_collector.store.files import replace_file, set_aside
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import DumpError, SourceError
from qemu_dump_ext.host_limits import start_needed_thread
from qemu_dump_ext.printable import printable
from qemu_dump_ext.value import Value

_FILE = ".notifications.json"
_BYTES_MAX = 16 << 20
_PENDING_MAX = 10_000
_ANSWER_MAX = 2000
_STOP_SECONDS = 2.0

Why: TypeAlias = Literal["new", "regression", "again"]

_logger = logging.getLogger(__name__)


class _Pending(Value):
    # What is to be told, to the how manyth of the configuration.
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    crash: str
    why: Why
    target: Annotated[int, Field(ge=0)]
    attempts: Annotated[int, Field(ge=0)] = 0
    due: float = 0.0


_PENDINGS = TypeAdapter(list[_Pending])


class Notifier:
    """Tells of crashes, in a thread of its own that may be left behind at any moment."""

    def __init__(
        self,
        store: CrashStore,
        targets: Sequence[Notification],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Read what an earlier agent left to be told.

        Args:
            store: Whose crashes.
            targets: Whom to tell.
            clock: Seconds; the same for the next agent.
        """
        self._store = store
        self._targets = targets
        self._clock = clock
        self._stored: SimpleQueue[CrashRecord] = SimpleQueue()
        self._pending = self._read()
        self._woken = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)

    def start(self) -> None:
        """Begin with what an earlier agent left."""
        start_needed_thread(self._thread, SourceError)

    def stop(self) -> None:
        """End; what is not told is told by the next agent."""
        self._ending = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def crash_stored(self, record: CrashRecord) -> None:
        """Have those told who want to hear of such a crash; returns at once."""
        self._stored.put(record)
        self._woken.set()

    def _take_stored(self) -> None:
        while not self._stored.empty():
            record = self._stored.get()
            why = why_told(self._store, record)
            self._pending += [
                _Pending(record.id, why, index)
                for index, target in enumerate(self._targets)
                if "all" in target.on or why in target.on
            ]
            del self._pending[:-_PENDING_MAX]
            self._write()

    def tell_due(self) -> float | None:
        """Tell everything whose time has come.

        Returns:
            Seconds until the next is tried again; None: nothing is left.
        """
        self._take_stored()
        for one in [one for one in self._pending if one.due <= self._clock()]:
            if self._ending:
                return None
            self._settle(one, self._tell(one))
        if not self._pending:
            return None
        return max(0.0, min(one.due for one in self._pending) - self._clock())

    def _tell(self, one: _Pending) -> str | None:
        """Tell it once; return why that failed, or None."""
        if one.target >= len(self._targets):
            return None  # the configuration has fewer now
        target = self._targets[one.target]
        try:
            record = self._store.record(one.crash)
        except DumpError:
            return None  # the limits were faster
        message = message_of(self._store, record, one.why)
        try:
            if target.webhook is not None:
                _post(target.webhook, message, target.timeout)
            else:
                directory = self._store.directory(record.id)
                _run(target.command, message, directory, target.timeout)
        except (
            OSError,
            ValueError,
            subprocess.SubprocessError,
            http.client.HTTPException,  # what answers is no HTTP server, or was cut off
        ) as error:
            return reason_of(error)
        return None

    def _settle(self, one: _Pending, failure: str | None) -> None:
        target = self._targets[one.target] if one.target < len(self._targets) else None
        attempts = one.attempts + 1
        self._pending.remove(one)
        if failure is None or target is None:
            _logger.info("told of %s (%s)", one.crash, one.why, extra={"crash": one.crash})
        elif attempts >= target.attempts:
            _logger.error("not told of %s, given up: %s", one.crash, failure)
        else:
            delay = min(target.retry * 2.0 ** min(attempts - 1, 32), target.retry_max)
            due = self._clock() + delay
            self._pending.append(replace(one, attempts=attempts, due=due))
            _logger.warning("not told of %s, tried again in %.0f s: %s", one.crash, delay, failure)
        self._write()

    def _read(self) -> list[_Pending]:
        path = self._store.path / _FILE
        try:
            with path.open("rb") as file:
                return _PENDINGS.validate_json(file.read(_BYTES_MAX))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            set_aside(path, reason_of(error))
        return []

    def _write(self) -> None:
        content = json.dumps([asdict(one) for one in self._pending], indent=1)
        try:
            replace_file(self._store.path / _FILE, content.encode())
        except OSError as error:
            _logger.warning("cannot write %s: %s", _FILE, error.strerror)

    def _work(self) -> None:
        while not self._ending:
            self._woken.clear()
            self._woken.wait(self.tell_due())
        self._take_stored()


def why_told(store: CrashStore, record: CrashRecord) -> Why:
    """Return what is to be said of a crash that has just been stored: its kind, in a word."""
    state = store.states().effective(record.signature.id)
    if state.state == "regression" and state.changed == record.time:
        return "regression"
    is_merged = store.states().canonical(record.signature.id) != record.signature.id
    return "new" if record.occurrence == 1 and not is_merged else "again"


def message_of(store: CrashStore, record: CrashRecord, why: Why) -> Mapping[str, Any]:
    """Return what is told: `text` for people, as chats show it, and the facts for programs."""
    words = {"new": "new crash", "regression": "crash came back", "again": "crash again"}[why]
    kernel = f", kernel {record.kernel}" if record.kernel else ""
    text = f"{words}: {record.signature.message} ({record.guest}{kernel}) {record.id}"
    return {
        "text": printable(text, keep=""),
        "why": why,
        "directory": str(store.directory(record.id)),
        "state": asdict(store.states().effective(record.signature.id)),
        "crash": record.as_dict(),
    }


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # To another place than the configuration has, what guests said is not sent.
    def redirect_request(self, *_arguments: Any, **_words: Any) -> None:
        return None


def _post(url: str, message: Mapping[str, Any], seconds: float) -> None:
    request = urllib.request.Request(  # noqa: S310 - the configuration allows http alone
        url,
        json.dumps(message).encode(),
        {"Content-Type": "application/json", "User-Agent": "qemu-crash-collector"},
    )
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds) as answer:
        answer.read(_ANSWER_MAX)


def _run(
    command: Sequence[str], message: Mapping[str, Any], directory: Path, seconds: float
) -> None:
    record = message["crash"]
    facts = {
        "CRASH_WHY": message["why"],
        "CRASH_TEXT": message["text"],
        "CRASH_DIRECTORY": str(directory),
        "CRASH_ID": record["id"],
        "CRASH_GUEST": record["guest"],
        "CRASH_SIGNATURE": record["signature"]["id"],
    }
    done = subprocess.run(
        command,
        input=json.dumps(message).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | facts,
        timeout=seconds,
        check=False,
        start_new_session=True,
    )
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace").strip()[-_ANSWER_MAX:]
        raise ValueError(f"{command[0]} ended with status {done.returncode}: {said}")
