"""QEMU's human monitor through libvirt, which has QEMU's QMP socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from qemu_dump_ext.connections.libvirt import LibvirtMonitor, connect_libvirt
from qemu_dump_ext.errors import MonitorAnswerError, SourceError
from qemu_dump_ext.qemu.monitor_text import parse_version

from .upstream import Upstream

_LOOK_SECONDS = 2.0
_SHORT_NAMES = {"c": "cont", "s": "stop"}

ResultT = TypeVar("ResultT")


class LibvirtUpstream(Upstream):
    """One domain; `stop` and `cont` are libvirt's own operations.

    Attributes:
        monitor: For a dump, which blocks in a thread of its own; None while the domain is away.
    """

    def __init__(self, domain: str, uri: str | None) -> None:
        super().__init__(f"libvirt:{domain}")
        self._domain = domain
        self._uri = uri
        self._opened = contextlib.ExitStack()
        self.monitor: LibvirtMonitor | None = None

    async def execute_hmp(self, line: str, cpu_index: int | None = None) -> str:
        """Return the answer of a line of the human monitor."""
        monitor = self.require_monitor()
        words = line.split()
        if len(words) == 1:
            line = _SHORT_NAMES.get(words[0], words[0])
        try:
            answer = await asyncio.to_thread(monitor.execute, line, cpu_index)
        except MonitorAnswerError as error:
            return f"Error: {error.answer}\r\n"
        return answer.replace("\n", "\r\n")

    def require_monitor(self) -> LibvirtMonitor:
        """Return what blocks in its thread while it waits for an answer.

        Raises:
            UpstreamGoneError: The domain is away.
        """
        if self.monitor is None:
            raise self._gone()
        return self.monitor

    async def close(self) -> None:
        """Disconnect."""
        self.monitor = None
        await asyncio.to_thread(self._opened.close)

    async def _connect(self) -> None:
        await self.close()
        self.monitor = await asyncio.to_thread(self._open)
        hear = self._hearer(asyncio.get_running_loop())
        self._opened.enter_context(self.monitor.listening(hear))
        self.version = parse_version(await self.execute_hmp("info version"))

    def _open(self) -> LibvirtMonitor:
        return self._opened.enter_context(connect_libvirt(self._domain, self._uri))

    def _hearer(self, loop: asyncio.AbstractEventLoop) -> Callable[[Any], None]:
        def hear(event: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(lambda: self.on_event(dict(event)))

        return hear

    async def _wait_lost(self) -> None:
        while (monitor := self.monitor) is not None:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                state = await asyncio.to_thread(monitor.state)
            except SourceError:
                break
            if state.startswith("shut off"):
                break
        await self.close()
