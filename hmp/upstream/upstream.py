"""The proxy's one connection to QEMU, whatever carries it: what the doors may ask of it."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qemu_dump_ext.errors import ConnectError, SourceError
from qemu_dump_ext.structures.dialect import QemuVersion

_RETRY_SECONDS = 0.3
Event = dict[str, Any]


class UpstreamGoneError(SourceError):
    """QEMU is gone; the proxy looks for it again."""


class Upstream(ABC):
    """A connection to QEMU that comes back when QEMU does.

    Attributes:
        address: The address as the user gave it.
        pid: Of QEMU's process where it is known otherwise than by the connection, or None.
        version: The version of QEMU.
        connected: Whether QEMU is there.
        gone: Set while it is not.
        on_state: Called when it comes or goes.
        on_text: Gets text that came unasked.
        on_event: Gets QMP events, in order with the answers.
    """

    def __init__(self, address: str, pid: int | None = None) -> None:
        self.address = address
        self.pid = pid
        self.version: QemuVersion = (0, 0, 0)
        self.connected = False
        self.gone = asyncio.Event()
        self.on_state: list[Callable[[], None]] = []
        self.on_text: Callable[[bytes], None] = lambda _text: None
        self.on_event: Callable[[Event], None] = lambda _event: None

    @property
    def version_text(self) -> str:
        """The version as in QEMU's banner."""
        return "{}.{}.{}".format(*self.version)

    async def start(self) -> None:
        """Connect for the first time.

        Raises:
            ConnectError: QEMU is not there, or not for us.
        """
        await self._connect()
        self._set_connected(connected=True)

    async def keep_connected(self) -> None:
        """Watch the connection, and connect again as often as it is lost."""
        while True:
            await self._wait_lost()
            self._set_connected(connected=False)
            while not self.connected:
                await asyncio.sleep(_RETRY_SECONDS)
                with contextlib.suppress(ConnectError, SourceError):
                    await self._connect()
                    self._set_connected(connected=True)

    def _set_connected(self, *, connected: bool) -> None:
        self.connected = connected
        if connected:
            self.gone.clear()
        else:
            self.gone.set()
        for listener in self.on_state:
            listener()

    def _gone(self) -> UpstreamGoneError:
        return UpstreamGoneError(f"QEMU is gone: nothing answers at {self.address}")

    def qemu_directory(self) -> Path:
        """Return the working directory of QEMU where it can be known, else ours."""
        return Path.cwd()

    @abstractmethod
    async def execute_hmp(self, line: str, cpu_index: int | None = None) -> str:
        """Return the answer of a line of the human monitor, as QEMU gives it.

        Args:
            line: Without a line end.
            cpu_index: The vCPU that the line is about; None: the first.

        Raises:
            UpstreamGoneError: QEMU is not there.
        """

    @abstractmethod
    async def close(self) -> None:
        """Disconnect."""

    @abstractmethod
    async def _connect(self) -> None: ...

    @abstractmethod
    async def _wait_lost(self) -> None: ...


def reason_of(error: BaseException) -> str:
    """Return why something could not be connected to, in the words of the operating system."""
    cause = error.__cause__ or error
    return (cause.strerror if isinstance(cause, OSError) else None) or str(cause)
