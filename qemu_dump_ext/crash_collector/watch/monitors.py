"""Guests that are watched by name, by PID or by a human monitor: the way to each, as it is now.

A human monitor tells no events: it is asked for the run state, and what changes is an event.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from qemu_dump_ext.connections.target import GuestTarget, find_monitor, find_process, managed_by
from qemu_dump_ext.crash_collector.record import QemuFacts
from qemu_dump_ext.crash_collector.watch.domains import connector as connector_by_libvirt
from qemu_dump_ext.crash_collector.watch.events import Event
from qemu_dump_ext.crash_collector.watch.hmp_questions import HmpQuestions
from qemu_dump_ext.crash_collector.watch.patience import Patience
from qemu_dump_ext.crash_collector.watch.session import (
    Connect,
    Contact,
    connect_by_qmp,
    instance_of,
    read_command_line,
)
from qemu_dump_ext.crash_collector.watch.thread_link import ThreadLink
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.qemu.command_line import QMP
from qemu_dump_ext.qemu.hmp import HmpMonitor, connect_hmp
from qemu_dump_ext.qemu.monitor_text import RUNNING
from qemu_dump_ext.qemu.process import find_qemu_process
from qemu_dump_ext.qemu.qemu_processes import qemu_process
from qemu_dump_ext.qemu.socket_kind import find_way

_LOOK_SECONDS = 1.0


class _HmpLink(ThreadLink):
    def __init__(
        self,
        questions: HmpQuestions,
        monitor: HmpMonitor,
        opened: contextlib.ExitStack,
        on_event: Callable[[Event], None],
        state: str,
    ) -> None:
        super().__init__("QEMU", questions.qmp, opened)
        self._questions = questions
        self._monitor = monitor
        self._on_event = on_event
        self._state = state

    async def changed(self) -> None:
        await asyncio.sleep(_LOOK_SECONDS)
        try:
            answer = await asyncio.to_thread(self._questions.qmp, "query-status")
        except SourceError:
            self._open = False
            return
        before, self._state = self._state, str(answer["status"])
        if before != self._state:
            self._on_event({"event": "RESUME" if self._state == RUNNING else "STOP"})

    def for_thread(self, _answer_seconds: float, patience: Patience) -> HmpQuestions:
        return HmpQuestions(self._monitor, self._questions.pid, patience)


def connector(target: GuestTarget, answer_seconds: float) -> Connect:
    """Return what connects to a guest by the way to it that is free now.

    Args:
        target: Which guest: by a human monitor, by name or by PID.
        answer_seconds: How long QEMU may take for an answer.
    """

    async def connect(on_event: Callable[[Event], None]) -> Contact:
        domain = await asyncio.to_thread(managed_by, target)
        if domain is not None:
            name, uri = domain
            return await connector_by_libvirt(name, uri or "")(on_event)
        found = await asyncio.to_thread(find_monitor, target)
        if found.use == QMP:
            return await connect_by_qmp(found.address, answer_seconds, on_event)
        return await asyncio.to_thread(_connect_by_hmp, found.address, found.pid, on_event)

    return connect


def _connect_by_hmp(address: str, pid: int | None, on_event: Callable[[Event], None]) -> Contact:
    opened = contextlib.ExitStack()
    try:
        monitor = opened.enter_context(connect_hmp(address))
        if pid is None:
            with contextlib.suppress(SourceError):
                pid = find_qemu_process([address])
        questions = HmpQuestions(monitor, pid, None)
        facts = _facts(questions, pid)
        state = str(questions.qmp("query-status")["status"])
    except BaseException:
        opened.close()
        raise
    link = _HmpLink(questions, monitor, opened, on_event, state)
    return Contact(link, facts, instance_of(pid) or address)


def _facts(questions: HmpQuestions, pid: int | None) -> QemuFacts:
    process = None if pid is None else qemu_process(pid)
    return QemuFacts(
        version=questions.execute("info version").strip()[:100],
        target="unknown" if process is None else process.target,
        pid=pid,
        command_line=None if pid is None else read_command_line(pid),
    )


def command_line_of(target: GuestTarget) -> tuple[str, ...] | None:
    """Return the command line of a guest's QEMU, or None: it is not there, or not seen."""
    with contextlib.suppress(SourceError):
        process = find_process(target)
        if process is None and target.hmp is not None:
            pid, found = find_monitor(target).pid, find_way(target.hmp)
            process = found[0] if found is not None else qemu_process(pid) if pid else None
        return None if process is None else tuple(process.words)
    return None
