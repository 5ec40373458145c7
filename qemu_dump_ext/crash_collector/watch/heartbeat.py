"""Find guests that make no progress."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable

from qemu.qmp import QMPError

from qemu_dump_ext.crash_collector.config.settings import Heartbeat
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.qemu.address import connectable
from qemu_dump_ext.qemu.qmp_client import new_client

_PING_SECONDS = 5.0


class Stillness:
    """Since when a sign of life has been the same. Pure but for the clock.

    Attributes:
        limit: Seconds.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._sign: object = None
        self._since: float | None = None
        self._told = False

    @property
    def is_still(self) -> bool:
        """Whether nothing has changed for as long as the limit, until now."""
        return self._told

    def see(self, sign: object) -> float | None:
        """Take a sign; None: nobody can tell now.

        Returns:
            For how many seconds it has been the same, once when that reaches the limit; else None.
        """
        now = self._clock()
        if sign is None or sign != self._sign or self._since is None:
            self._sign, self._since, self._told = sign, None if sign is None else now, False
            return None
        if self._told or now - self._since < self.limit:
            return None
        self._told = True
        return now - self._since


async def sign_of_vcpus(qmp: Callable[..., Awaitable[object]]) -> object:
    """Return what is the same as long as no vCPU does anything, or None: the guest is stopped.

    Raises:
        SourceError: QEMU does not tell.
    """
    status = await qmp("query-status")
    if not (isinstance(status, dict) and status.get("running")):
        return None
    text = await qmp("human-monitor-command", {"command-line": "info registers -a"})
    return hashlib.sha256(str(text).encode()).digest()


class AgentPing:
    """Pings the guest agent; a sign is the number of answers, and None before the first."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._answers = 0

    async def sign(self, qmp: Callable[..., Awaitable[object]]) -> object:
        """Return the sign of life; None, too, while the guest is stopped.

        Raises:
            SourceError: QEMU does not tell whether the guest runs.
        """
        status = await qmp("query-status")
        if not (isinstance(status, dict) and status.get("running")):
            return None
        agent = new_client()
        agent.await_greeting = agent.negotiate = False
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            try:
                async with asyncio.timeout(_PING_SECONDS):
                    with connectable(self._address) as target:
                        await agent.connect(target)
                    await agent.execute("guest-ping")
                    self._answers += 1
            finally:
                async with asyncio.timeout(_PING_SECONDS):
                    await agent.disconnect()
        return self._answers or None


async def watch_progress(
    heartbeat: Heartbeat,
    address: str,
    qmp: Callable[..., Awaitable[object]],
    stillness: Stillness,
    on_still: Callable[[float], None],
) -> None:
    """Look at a guest again and again, until cancelled.

    Args:
        heartbeat: How.
        address: The address of the guest agent's socket; empty where it is not asked.
        qmp: Executes a command of QEMU's.
        stillness: Knows for how long nothing has changed.
        on_still: Told once for how many seconds nothing has changed.
    """
    ping = AgentPing(address)
    while True:
        await asyncio.sleep(heartbeat.interval)
        try:
            by_agent = heartbeat.by == "guest-agent"
            sign = await (ping.sign(qmp) if by_agent else sign_of_vcpus(qmp))
        except SourceError:
            sign = None
        if (seconds := stillness.see(sign)) is not None:
            on_still(seconds)
