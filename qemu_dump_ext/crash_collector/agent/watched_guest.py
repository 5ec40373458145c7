"""One guest under the agent's eyes: what happens to it, and what is done about it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qemu_dump_ext.crash_collector.agent.after_action import run_action, run_command
from qemu_dump_ext.crash_collector.agent.intake import CrashIntake
from qemu_dump_ext.crash_collector.agent.journal import GuestState, Journal
from qemu_dump_ext.crash_collector.agent.slots import CollectionSlots
from qemu_dump_ext.crash_collector.collect.budget import CollectionGivenUpError, DumpBudget
from qemu_dump_ext.crash_collector.collect.collection import CrashCollector, CrashTask
from qemu_dump_ext.crash_collector.config.settings import AfterCommand
from qemu_dump_ext.crash_collector.outlets.outlets import CrashOutlets
from qemu_dump_ext.crash_collector.record import CrashCause, CrashRecord, QemuFacts, utc_text
from qemu_dump_ext.crash_collector.store.prune import prune
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.crash_collector.watch.console import ConsoleLog
from qemu_dump_ext.crash_collector.watch.events import (
    STOPPED_BY_QEMU,
    Event,
    cause_of_event,
    cause_of_status,
    waits_for_stop,
)
from qemu_dump_ext.crash_collector.watch.guests import Guest
from qemu_dump_ext.crash_collector.watch.heartbeat import watch_progress
from qemu_dump_ext.crash_collector.watch.panic_action import require_pause
from qemu_dump_ext.crash_collector.watch.patience import Patience
from qemu_dump_ext.crash_collector.watch.session import Contact, GuestSession
from qemu_dump_ext.errors import (
    DumpError,
    DumpWriteError,
    MonitorAnswerError,
    RequestError,
    SourceError,
)

_STOP_SECONDS = 5.0
_RELEASE_SECONDS = 2.0
_SETTLE_SECONDS = 3.0  # from a line on the console to the panic event that often follows
_UNKNOWN = QemuFacts("unknown", "unknown", None, None)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Services:
    """What all guests of an agent share.

    Attributes:
        store: Where crashes go.
        journal: What is under way.
        budget: Whether there may be a dump.
        outlets: Where a crash is shown once it is stored.
        slots: Where collections run.
        answer_seconds: How long QEMU may take to answer.
        collection_seconds: How long QEMU may be asked about one crash.
        retry_seconds: Until a crash that could not be stored is collected again.
        now: The clock of the records.
        ending: Set when the agent ends.
    """

    store: CrashStore
    journal: Journal
    budget: DumpBudget
    outlets: CrashOutlets
    slots: CollectionSlots
    answer_seconds: float
    collection_seconds: float
    retry_seconds: float
    now: Callable[[], datetime]
    ending: asyncio.Event


class WatchedGuest:
    """Watches a guest until it is closed.

    Attributes:
        guest: Which one.
        session: The connection to it.
    """

    def __init__(self, guest: Guest, services: Services) -> None:
        self.guest = guest
        self.session = GuestSession(guest.address, services.answer_seconds)
        self._services = services
        self._journal = services.journal
        self._tasks: set[asyncio.Task[Any]] = set()
        self._collection: asyncio.Task[CrashRecord] | None = None
        self._intake = CrashIntake(guest)
        self._has_stopped = asyncio.Event()
        self._is_attempting = False
        self._greeted: Contact | None = None
        self._shut_down = False
        self._console: ConsoleLog | None = None
        if guest.settings.console is not None and "console" in guest.settings.causes:
            path = Path(guest.fill(guest.settings.console))
            self._console = ConsoleLog(path, guest.settings.console_patterns)

    @property
    def is_collecting(self) -> bool:
        """Tell whether a crash is being collected."""
        return self._collection is not None and not self._collection.done()

    def start(self) -> None:
        """Begin to watch; an event loop runs."""
        self._spawn(self.session.run(self._on_event, self._on_contact, self._on_lost))
        heartbeat = self.guest.settings.heartbeat
        if heartbeat is not None and "no-progress" in self.guest.settings.causes:
            agent = self.guest.fill(heartbeat.socket) if heartbeat.socket else ""
            self._spawn(watch_progress(heartbeat, agent, self.session.qmp, self._on_still))

    async def close(self) -> None:
        """Stop watching; a crash that is being collected is collected first, or given up."""
        if self._collection is not None:
            await asyncio.wait([self._collection])
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    async def trigger(self, detail: str) -> CrashRecord:
        """Collect now because somebody says so; returns what was stored.

        Raises:
            RequestError: A crash is being collected already.
            SourceError: The guest is not there.
            DumpWriteError: It cannot be stored.
        """
        if self.is_collecting:
            raise RequestError(f"a crash of {self.guest.name} is being collected already")
        if self.session.contact is None:
            raise SourceError(f"{self.guest.name} is not there: no QMP at {self.guest.address}")
        self._begin(CrashCause("trigger", detail))
        try:
            return await asyncio.shield(self._under_way())
        except CollectionGivenUpError as error:
            raise RequestError(str(error)) from error

    def look_at_console(self) -> None:
        """Look for new lines; called again and again."""
        if self._console is not None and not self.is_collecting:
            line = self._console.look()
            if line is not None and self.session.contact is not None:
                self._crash(CrashCause("console", line), settle=True)

    def record_lost(self, state: GuestState, gone: str) -> None:
        """Store what is known of a crash whose QEMU is gone.

        Args:
            state: What the journal has.
            gone: Why there is no dump.
        """
        if state.cause is not None and not self.is_collecting:
            self._begin(state.cause, time=state.time, gone=gone)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("a task of the agent failed", exc_info=error, extra=self._extra())

    def _extra(self, **more: object) -> dict[str, object]:
        return {"guest": self.guest.name, **more}

    # What QEMU tells

    def _on_event(self, event: Event) -> None:
        name = event.get("event")
        if name == "SHUTDOWN":
            self._shut_down = True
        elif name == "STOP":
            self._has_stopped.set()
            if not self.is_collecting:
                self._spawn(self._look_at_status())
        elif name == "RESUME" and not self.is_collecting:
            self._spawn(self._note(handled=None, stopped=False))
        if (cause := cause_of_event(event)) is not None:
            waits = waits_for_stop(event)
            if waits:
                self._has_stopped.clear()
            self._crash(cause, waits=waits)

    async def _look_at_status(self) -> None:
        with suppress(SourceError):
            status = await self.session.status()
            if not await self._resume_owed(status) and (cause := cause_of_status(status)):
                self._crash(cause)

    def _on_still(self, seconds: float) -> None:
        how = self.guest.settings.heartbeat
        by = how.by if how else ""
        self._crash(CrashCause("no-progress", f"{by}: nothing has changed for {seconds:.0f} s"))

    async def _on_contact(self) -> None:
        contact = self.session.contact
        if contact is None:
            return
        if self._greeted is not contact:
            self._greeted, self._shut_down = contact, False
            _logger.info("connected: QEMU %s", contact.facts.version, extra=self._extra())
            await require_pause(self.session, contact.facts.command_line or (), self.guest.name)
        status = await self.session.status()
        state = self._journal.states.get(self.guest.name)
        if state is not None and state.qemu != contact.instance:
            self.record_lost(state, "its QEMU was gone when the agent came back")
            if state.cause is None:
                await self._forget()
            state = None
        if not self._is_attempting and await self._resume_owed(status):
            status = await self.session.status()
        if self.is_collecting:
            return
        if state is not None and state.cause is not None:
            _logger.warning("a crash is taken up again", extra=self._extra())
            self._begin(state.cause, time=state.time)
        elif state is not None and state.stored is not None:
            self._spawn(self._finish(state.stored, status))
        elif (cause := cause_of_status(status)) and not (state and state.handled == status):
            self._crash(cause)

    def _on_lost(self, ended: bool) -> None:
        if not ended:
            _logger.warning("the connection was lost", extra=self._extra())
            return
        if self._shut_down:
            _logger.info("QEMU has ended", extra=self._extra())
        else:
            self._crash(CrashCause("qemu-died", "QEMU ended without having shut down"))
        if not self.is_collecting:
            self._spawn(self._forget())

    async def _resume_owed(self, status: str) -> bool:
        """Let the guest run again if we stopped it and it still stands still for that alone."""
        state, contact = self._journal.states.get(self.guest.name), self.session.contact
        if state is None or not state.stopped or not contact or state.qemu != contact.instance:
            return False
        if status == "paused":
            await self.session.qmp("cont")
            _logger.warning("we had stopped the guest: it runs again", extra=self._extra())
        await self._note(stopped=False)
        return status == "paused"

    async def _release(self) -> None:
        """Pay what the last attempt to collect owes the guest; without QEMU, `_on_contact` does."""
        while self.session.contact is not None:
            try:
                await self._resume_owed(await self.session.status())
            except SourceError as error:
                _logger.error("the guest may still be stopped: %s", error, extra=self._extra())  # noqa: TRY400
            else:
                return
            await asyncio.sleep(_RELEASE_SECONDS)

    # What is done about it

    def _crash(self, cause: CrashCause, *, waits: bool = False, settle: bool = False) -> None:
        if self._intake.is_new(cause, is_collecting=self.is_collecting):
            self._begin(cause, waits=waits, settle=settle)

    def _begin(
        self,
        cause: CrashCause,
        *,
        time: str | None = None,
        waits: bool = False,
        settle: bool = False,
        gone: str | None = None,
    ) -> None:
        self._intake.begin(cause)
        self._collection = asyncio.create_task(
            self._collect(
                time or utc_text(self._services.now()),
                again=time is not None,
                waits=waits,
                settle=settle,
                gone=gone,
            )
        )
        self._tasks.add(self._collection)
        self._collection.add_done_callback(self._collection_ended)

    def _under_way(self) -> asyncio.Task[CrashRecord]:
        if self._collection is None:
            raise RequestError(f"no crash of {self.guest.name} is being collected")
        return self._collection

    def _collection_ended(self, task: asyncio.Task[CrashRecord]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        following = self._intake.take_next()
        if following is not None and not self._services.ending.is_set():
            self._begin(following, waits=waits_for_stop(following.event or {}))
        if (error := task.exception()) is None:
            return
        if isinstance(error, (DumpError, CollectionGivenUpError)):
            _logger.error("not collected: %s", error, extra=self._extra())
        else:
            _logger.error("not collected", exc_info=error, extra=self._extra())

    async def _collect(
        self, time: str, *, again: bool, waits: bool, settle: bool, gone: str | None
    ) -> CrashRecord:
        contact = self.session.contact if gone is None else None
        instance = contact.instance if contact else self.guest.address
        state = GuestState(instance, self._intake.cause, time)
        with suppress(DumpWriteError):
            await asyncio.to_thread(self._journal.set, self.guest.name, state)
        if waits:
            await _at_most(_STOP_SECONDS, self._has_stopped)
        if settle:
            await _at_most(_SETTLE_SECONDS, self._intake.superseded)
        if self._console is not None and gone is None:
            self._console.skip()  # it tells of this crash; what comes later, of another
        record = self._services.store.find(self.guest.name, time) if again else None
        if record is None:  # or else an agent stored it that could not write that down any more
            record = await self._store_crash(time, gone)
        self._intake.crash_stored()
        await self._note(cause=None, stored=record.id)
        _logger.info(
            "collected: %s, %s",
            record.signature.message,
            record.dump.file or f"no dump: {record.dump.reason}",
            extra=self._extra(crash=record.id, signature=record.signature.id),
        )
        await self._finish(record.id, await self._status_or_gone())
        return record

    async def _store_crash(self, time: str, gone: str | None) -> CrashRecord:
        services = self._services
        while True:
            contact = self.session.contact if gone is None else None
            patience = Patience(services.collection_seconds, services.answer_seconds)
            task = CrashTask(
                guest=self.guest,
                cause=self._intake.cause or CrashCause("trigger", ""),
                time=time,
                facts=self.session.last_facts or _UNKNOWN,
                qmp=self.session.for_thread(patience) if contact else None,
                gone=gone or "QEMU was gone, and its memory with it",
                also=self._intake.also,
                patience=patience,
            )
            collector = CrashCollector(
                task, self._services.store, self._services.budget, set_stopped=self._set_stopped
            )
            try:
                self._is_attempting = True
                try:
                    record = await services.slots.run(collector.collect, patience)
                finally:
                    self._is_attempting = False
                    self._spawn(self._release())
            except DumpWriteError as error:
                self._services.outlets.crash_not_stored()
                if task.cause.kind == "trigger":
                    await self._note(cause=None)
                    raise
                _logger.error("%s; tried again later", error, extra=self._extra())  # noqa: TRY400
            else:
                self._services.outlets.crash_stored(record, collector.dump_seconds)
                return record
            await _at_most(self._services.retry_seconds, self._services.ending)
            self._services.budget.check_ending()

    def _set_stopped(self, stopped: bool) -> None:
        self._journal.change(self.guest.name, stopped=stopped)

    async def _note(self, **changes: Any) -> None:
        if self.guest.name not in self._journal.states and not any(changes.values()):
            return
        try:
            await asyncio.to_thread(self._journal.change, self.guest.name, **changes)
        except DumpWriteError as error:
            _logger.error("%s", error, extra=self._extra())  # noqa: TRY400

    async def _forget(self) -> None:
        await self._note(cause=None, stopped=False, stored=None, handled=None)

    async def _finish(self, crash_id: str, status: str) -> None:
        """Do what is to be done behind a crash that is stored, and remember that it is done."""
        if status != "gone":
            try:
                await self._act(crash_id, status)
            except (SourceError, RequestError, DumpError, OSError) as error:
                _logger.error("after-action: %s", error, extra=self._extra(crash=crash_id))  # noqa: TRY400
            status = await self._status_or_gone()
        await self._note(stored=None, handled=status if status in STOPPED_BY_QEMU else None)
        try:
            await asyncio.to_thread(
                prune,
                self._services.store,
                self._services.budget.limits,
                now=self._services.now(),
                needs_upload=self._services.budget.needs_upload,
            )
        except DumpWriteError as error:
            _logger.error("%s", error, extra=self._extra())  # noqa: TRY400

    async def _status_or_gone(self) -> str:
        try:
            return await self.session.status()
        except MonitorAnswerError as error:
            _logger.warning("%s", error, extra=self._extra())
            return "unknown"
        except SourceError:
            return "gone"

    async def _act(self, crash_id: str, status: str) -> None:
        action = self.guest.settings.after
        if isinstance(action, AfterCommand):
            await run_command(action, self._services.store, crash_id, self._services.ending)
            return
        if action == "quit":
            self._shut_down = True  # that QEMU ends then is not a crash
        await run_action(action, self.session, status)


async def _at_most(seconds: float, event: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
