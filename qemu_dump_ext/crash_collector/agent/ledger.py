"""What the journal has of one guest, and what we owe the guest by it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from qemu_dump_ext.crash_collector.agent.journal import GuestState, Journal
from qemu_dump_ext.crash_collector.watch.session import GuestSession
from qemu_dump_ext.errors import DumpWriteError, SourceError

_RELEASE_SECONDS = 2.0
_OURS = "paused"
"""Run state of a guest that was stopped by `stop`, and by nothing else."""

_logger = logging.getLogger(__name__)


class GuestLedger:
    """Of one guest.

    Attributes:
        is_collecting: A crash is being collected: that the guest stands still is as it shall be.
    """

    def __init__(self, name: str, journal: Journal, session: GuestSession) -> None:
        self.is_collecting = False
        self._name = name
        self._journal = journal
        self._session = session

    @property
    def state(self) -> GuestState | None:
        """What is remembered; None: nothing."""
        return self._journal.states.get(self._name)

    def set_stopped(self, stopped: bool) -> None:
        """Remember that we stop the guest, or that it runs again; in any thread.

        Raises:
            DumpWriteError: It cannot be written.
        """
        self._journal.change(self._name, stopped=stopped)

    async def begin(self, state: GuestState) -> None:
        """Remember that a crash is being collected; without that, it is collected as well."""
        try:
            await asyncio.to_thread(self._journal.set, self._name, state)
        except DumpWriteError as error:
            self._complain("%s", error)

    async def note(self, **changes: Any) -> None:
        """Remember something else."""
        if self.state is None and not any(changes.values()):
            return
        try:
            await asyncio.to_thread(self._journal.change, self._name, **changes)
        except DumpWriteError as error:
            self._complain("%s", error)

    async def forget(self) -> None:
        """Remember nothing: its QEMU is gone."""
        await self.note(cause=None, stopped=False, stored=None, handled=None)

    async def resume_owed(self, status: str) -> bool:
        """Let the guest run again if we stopped it and it still stands still for that alone.

        Args:
            status: Its run state.

        Returns:
            Whether it was let run.

        Raises:
            SourceError: QEMU refuses it, or is gone.
        """
        state, contact = self.state, self._session.contact
        if self.is_collecting or state is None or not state.stopped:
            return False
        if contact is None or state.qemu != contact.instance:
            return False
        if status == _OURS:
            await self._session.qmp("cont")
            extra = {"guest": self._name}
            _logger.warning("we had stopped the guest: it runs again", extra=extra)
        await self.note(stopped=False)
        return status == _OURS

    async def release(self) -> None:
        """Pay what is owed, unless QEMU is gone: whoever meets it next pays then."""
        while self._session.contact is not None:
            try:
                await self.resume_owed(await self._session.status())
            except SourceError as error:
                self._complain("the guest may still be stopped: %s", error)
            else:
                return
            await asyncio.sleep(_RELEASE_SECONDS)

    def _complain(self, message: str, error: Exception) -> None:
        _logger.error(message, error, extra={"guest": self._name})
