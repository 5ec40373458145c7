"""Guests that libvirt runs, watched through it: a connection to each.

Two programs virsh stand by for each domain: one that is asked, and one that prints events.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from qemu_dump_ext.connections.libvirt import LibvirtMonitor, connect_libvirt
from qemu_dump_ext.crash_collector.record import QemuFacts
from qemu_dump_ext.crash_collector.watch.events import Event
from qemu_dump_ext.crash_collector.watch.patience import Patience
from qemu_dump_ext.crash_collector.watch.session import (
    Connect,
    Contact,
    instance_of,
    read_command_line,
)
from qemu_dump_ext.crash_collector.watch.thread_link import ThreadLink
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.qemu.qmp_message import version_text

_LOOK_SECONDS = 1.0
_SHUT_OFF = "shut off"


class _LibvirtLink(ThreadLink):
    def __init__(self, monitor: LibvirtMonitor, opened: contextlib.ExitStack) -> None:
        super().__init__("libvirt", monitor.qmp, opened)
        self._monitor = monitor

    async def changed(self) -> None:
        await asyncio.sleep(_LOOK_SECONDS)
        try:
            state = await asyncio.to_thread(self._monitor.state)
            # Where events have ended, what happened meanwhile is asked of the next connection.
            self._open = not state.startswith(_SHUT_OFF) and self._monitor.hears_events
        except SourceError:
            self._open = False

    def for_thread(self, _answer_seconds: float, patience: Patience) -> LibvirtMonitor:
        return self._monitor.asked_within(patience.asking)


def connector(domain: str, uri: str) -> Connect:
    """Return what connects to a domain.

    Args:
        domain: Its name.
        uri: Of libvirt's connection.
    """

    async def connect(on_event: Callable[[Event], None]) -> Contact:
        opened = contextlib.ExitStack()
        loop = asyncio.get_running_loop()

        def hear(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(on_event, event)

        def open_domain() -> tuple[LibvirtMonitor, QemuFacts]:
            monitor = opened.enter_context(connect_libvirt(domain, uri))
            opened.enter_context(monitor.listening(hear))
            return monitor, _facts(monitor)

        try:
            monitor, facts = await asyncio.to_thread(open_domain)
        except BaseException:
            await asyncio.to_thread(opened.close)
            raise
        link = _LibvirtLink(monitor, opened)
        return Contact(link, facts, instance_of(monitor.pid) or f"{uri}#{monitor.uuid}")

    return connect


def _facts(monitor: LibvirtMonitor) -> QemuFacts:
    return QemuFacts(
        version=version_text(monitor.qmp("query-version")),
        target=monitor.target_name() or "unknown",
        pid=monitor.pid,
        command_line=None if monitor.pid is None else read_command_line(monitor.pid),
    )
