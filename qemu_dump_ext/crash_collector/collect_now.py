"""`collect_crash`: what the agent stores of a crash, for whoever needs it once: a failing test."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from qemu_dump_ext.crash_collector.collect.budget import DumpBudget
from qemu_dump_ext.crash_collector.collect.collection import CrashCollector
from qemu_dump_ext.crash_collector.collect.task import CrashTask
from qemu_dump_ext.crash_collector.config.settings import GuestEntry, Limits
from qemu_dump_ext.crash_collector.forms import is_guest_name, utc_text
from qemu_dump_ext.crash_collector.record import CrashCause, CrashRecord, QemuFacts
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.crash_collector.watch.events import cause_of_status
from qemu_dump_ext.crash_collector.watch.guests import Guest
from qemu_dump_ext.crash_collector.watch.patience import Patience
from qemu_dump_ext.crash_collector.watch.session import find_command_line, read_command_line
from qemu_dump_ext.dump_formats import find_dump_format
from qemu_dump_ext.errors import MonitorAnswerError, RequestError, SourceError
from qemu_dump_ext.qemu.process import find_qemu_process
from qemu_dump_ext.qemu.qmp import SharedQmp, connect_qmp
from qemu_dump_ext.qemu.qmp_message import run_state, version_text

_RELEASE_SECONDS = 60.0
_RETRY_SECONDS = 0.5
_logger = logging.getLogger(__name__)
_UNKNOWN = QemuFacts("unknown", "unknown", None, None)
_ANY_NUMBER = 1 << 30
_NO_LABELS: Mapping[str, str] = MappingProxyType({})


def collect_crash(
    qmp_socket: str | Path,
    directory: str | Path,
    *,
    name: str | None = None,
    console: str | Path | None = None,
    detail: str = "somebody said so",
    labels: Mapping[str, str] = _NO_LABELS,
    dump_format: str = "kdump-raw-zlib",
    message: str | None = None,
) -> Path:
    """Store a guest's dump, log, registers and console; the guest is afterwards as it was before.

    Args:
        qmp_socket: Path or HOST:PORT; nobody else may be connected to it.
        directory: A store; made if there is none, and added to if there is.
        name: Of the guest; default: that of the socket without what is behind its last dot.
        console: File to which QEMU logs the console.
        detail: One line that says why.
        labels: Any words; stored with it.
        dump_format: By the name that QMP has for it.
        message: What to call the crash where the kernel's log does not tell; None: by its cause.

    Returns:
        The directory of the crash, complete: `crash.json` says what is in it, and what could not
        be had. Where QEMU is gone, that is all but the console.

    Raises:
        RequestError: `name` is no name for a directory, or the format is unknown.
        DumpWriteError: It cannot be stored.
    """
    address = str(qmp_socket)
    guest_name = Path(address).stem if name is None else name
    if not is_guest_name(guest_name):
        raise RequestError(f"{guest_name!r} is no name for a directory", hint="give a `name`")
    find_dump_format(dump_format)
    settings = GuestEntry(
        socket=address,
        format=dump_format,
        console=None if console is None else _literal(str(console)),
        labels=dict(labels),
        dumps_per_signature=_ANY_NUMBER,
    )
    guest = Guest(guest_name, address, settings)
    store = CrashStore(Path(directory))
    store.prepare()
    is_stopped = threading.Event()
    with contextlib.ExitStack() as stack:
        # Behind the end of this connection, for QEMU serves one client.
        stack.callback(_release, address, is_stopped)
        monitor: SharedQmp | None = None
        facts, gone = _UNKNOWN, ""
        cause = CrashCause("trigger", detail)
        try:
            monitor = stack.enter_context(connect_qmp(address))
            facts = _facts(monitor, address)
            with contextlib.suppress(MonitorAnswerError):  # the collection says what it was
                cause = cause_of_status(run_state(monitor.qmp("query-status"))) or cause
        except SourceError as error:
            gone = str(error)
            if find_command_line(address) is None:
                cause = CrashCause("qemu-died", detail)
        task = CrashTask(
            guest,
            cause,
            utc_text(datetime.now(UTC)),
            facts,
            None if gone else monitor,
            gone,
            {},
            Patience(math.inf, math.inf),
            message,
        )
        record = _collect(task, store, is_stopped)
    return store.directory(record.id)


def _release(address: str, is_stopped: threading.Event) -> None:
    """Let the guest run again where the connection was lost that had stopped it."""
    deadline = time.monotonic() + _RELEASE_SECONDS
    while is_stopped.is_set():
        try:
            with connect_qmp(address) as monitor:
                if run_state(monitor.qmp("query-status")) == "paused":
                    monitor.qmp("cont")
                return
        except SourceError as error:
            if time.monotonic() > deadline or find_command_line(address) is None:
                _logger.error("the guest may still be stopped: %s", error)  # noqa: TRY400
                return
            time.sleep(_RETRY_SECONDS)


def _collect(task: CrashTask, store: CrashStore, is_stopped: threading.Event) -> CrashRecord:
    budget = DumpBudget(store, Limits())

    def set_stopped(stopped: bool) -> None:
        (is_stopped.set if stopped else is_stopped.clear)()

    collector = CrashCollector(task, store, budget, set_stopped=set_stopped)
    # Which leaves signals to this thread; an interrupt gives up, and lets the guest run again.
    with ThreadPoolExecutor(1) as pool:
        collected = pool.submit(collector.collect)
        try:
            return collected.result().record
        except BaseException:
            budget.ending.set()
            raise


def _facts(monitor: SharedQmp, address: str) -> QemuFacts:
    version = monitor.qmp("query-version")
    pid = None
    with contextlib.suppress(SourceError):
        pid = find_qemu_process((address,))
    return QemuFacts(
        version_text(version),
        monitor.target_name() or "unknown",
        pid,
        None if pid is None else read_command_line(pid),
    )


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
