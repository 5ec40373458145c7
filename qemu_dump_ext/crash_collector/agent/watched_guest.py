"""One guest under the agent's eyes: what happens to it, and what is done about it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from qemu_dump_ext.crash_collector.agent.collection_run import (
    CollectionRun,
    Crash,
    Surroundings,
    finish,
)
from qemu_dump_ext.crash_collector.agent.intake import CrashIntake
from qemu_dump_ext.crash_collector.agent.journal import GuestState
from qemu_dump_ext.crash_collector.agent.ledger import GuestLedger
from qemu_dump_ext.crash_collector.agent.services import Services
from qemu_dump_ext.crash_collector.agent.stage import Stage
from qemu_dump_ext.crash_collector.collect.budget import CollectionGivenUpError
from qemu_dump_ext.crash_collector.collect.task import access_by
from qemu_dump_ext.crash_collector.forms import utc_text
from qemu_dump_ext.crash_collector.record import CrashCause, CrashRecord
from qemu_dump_ext.crash_collector.watch.console import ConsoleLog
from qemu_dump_ext.crash_collector.watch.domains import connector as connector_by_libvirt
from qemu_dump_ext.crash_collector.watch.events import (
    Event,
    cause_of_event,
    cause_of_status,
    waits_for_stop,
)
from qemu_dump_ext.crash_collector.watch.guests import Guest
from qemu_dump_ext.crash_collector.watch.heartbeat import Stillness, watch_progress
from qemu_dump_ext.crash_collector.watch.monitors import connector
from qemu_dump_ext.crash_collector.watch.panic_action import require_pause
from qemu_dump_ext.crash_collector.watch.patience import Patience
from qemu_dump_ext.crash_collector.watch.session import Connect, Contact, GuestSession
from qemu_dump_ext.engine.keep import keep_guest
from qemu_dump_ext.errors import DumpError, RequestError, SourceError
from qemu_dump_ext.qemu.qemu_processes import qemu_process

_STATE_SECONDS = 5.0
_KEEP_SECONDS = 60.0
_WORD_OF_STATUS = {"guest-panicked": "panicked"}

_logger = logging.getLogger(__name__)


class WatchedGuest:
    """Watches a guest until it is closed.

    Attributes:
        guest: Which one.
        session: The connection to it.
    """

    def __init__(self, guest: Guest, services: Services) -> None:
        self.guest = guest
        self.session = GuestSession(
            guest.address, services.answer_seconds, _connect_of(guest, services.answer_seconds)
        )
        self._services = services
        self._ledger = GuestLedger(guest.name, services.journal, self.session)
        self._intake = CrashIntake(guest)
        self._has_stopped = asyncio.Event()
        self._console = _console_of(guest)
        self._around = Surroundings(
            guest,
            self.session,
            self._ledger,
            self._intake,
            self._has_stopped,
            self._console,
            self._expect_end,
            self._spawn,
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._run: CollectionRun | None = None
        self._collection: asyncio.Task[CrashRecord] | None = None
        self._greeted: Contact | None = None
        self._prepared: Contact | None = None
        self._ends_in_peace = False
        self._stillness: Stillness | None = None

    @property
    def is_collecting(self) -> bool:
        """Tell whether a crash is being collected."""
        return self.stage is not Stage.ENDED

    @property
    def stage(self) -> Stage:
        """Where the collection of the last crash is; `ENDED` too where there was none."""
        return Stage.ENDED if self._run is None else self._run.stage

    @property
    def is_ready(self) -> bool:
        """Tell whether its QEMU is there, and has been told to keep the guest when it panics."""
        contact = self.session.contact
        return contact is not None and contact is self._prepared

    async def state(self) -> str:
        """Return how the guest is, in a word.

        Returns:
            `running`, `hung`, `panicked`, `gone`; `no answer` where its QEMU is silent; or its run
            state.
        """
        if self.session.contact is None:
            return "gone"
        try:
            async with asyncio.timeout(_STATE_SECONDS):
                status = await self.session.status()
        except (DumpError, TimeoutError):
            return "no answer"
        if status == "running" and self._stillness is not None and self._stillness.is_still:
            return "hung"
        return _WORD_OF_STATUS.get(status, status)

    def start(self) -> None:
        """Begin to watch; an event loop runs."""
        self._spawn(self.session.run(self._on_event, self._on_contact, self._on_lost))
        heartbeat = self.guest.settings.heartbeat
        if heartbeat is not None and "no-progress" in self.guest.settings.causes:
            agent = self.guest.fill(heartbeat.socket) if heartbeat.socket else ""
            self._stillness = Stillness(heartbeat.after)
            self._spawn(
                watch_progress(heartbeat, agent, self.session.qmp, self._stillness, self._on_still)
            )

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
            where = self.guest.address
            raise SourceError(f"{self.guest.name} is not there: nobody answers at {where}")
        self._begin(CrashCause("trigger", detail), Crash(self._now()))
        try:
            return await asyncio.shield(self._under_way())
        except CollectionGivenUpError as error:
            raise RequestError(str(error)) from error

    def look_at_console(self) -> None:
        """Look for new lines; called again and again."""
        if self._console is not None and not self.is_collecting:
            line = self._console.look()
            if line is not None and self.session.contact is not None:
                self._crash(CrashCause("console", line), settles=True)

    def record_lost(self, state: GuestState, gone: str) -> None:
        """Store what is known of a crash whose QEMU is gone.

        Args:
            state: What the journal has.
            gone: Why there is no dump.
        """
        if state.cause is not None and not self.is_collecting:
            self._begin(state.cause, Crash(state.time, again=True, gone=gone))

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
            self._expect_end()
        elif name == "STOP":
            self._has_stopped.set()
            if not self.is_collecting:
                self._spawn(self._look_at_status())
        elif name == "RESUME" and not self.is_collecting:
            self._spawn(self._ledger.note(handled=None, stopped=False))
        if (cause := cause_of_event(event)) is not None:
            waits = waits_for_stop(event)
            if waits:
                self._has_stopped.clear()
            self._crash(cause, waits=waits)

    async def _look_at_status(self) -> None:
        with suppress(SourceError):
            status = await self.session.status()
            if not await self._ledger.resume_owed(status) and (cause := cause_of_status(status)):
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
            self._greeted, self._ends_in_peace = contact, False
            _logger.info("connected: QEMU %s", contact.facts.version, extra=self._extra())
            await require_pause(self.session, contact.facts.command_line or (), self.guest.name)
            self._prepared = contact
            self._spawn(self._keep(contact))
        status = await self.session.status()
        state = self._ledger.state
        if state is not None and state.qemu != contact.instance:
            self.record_lost(state, "its QEMU was gone when the agent came back")
            if state.cause is None:
                await self._ledger.forget()
            state = None
        if await self._ledger.resume_owed(status):
            status = await self.session.status()
        if self.is_collecting:
            return
        if state is not None and state.cause is not None:
            _logger.warning("a crash is taken up again", extra=self._extra())
            self._begin(state.cause, Crash(state.time, again=True))
        elif state is not None and state.stored is not None:
            self._spawn(finish(state.stored, status, self._around, self._services))
        elif (cause := cause_of_status(status)) and not (state and state.handled == status):
            self._crash(cause)

    async def _keep(self, contact: Contact) -> None:
        """Write down what a dump needs when QEMU does not answer any more."""
        process = None if contact.facts.pid is None else qemu_process(contact.facts.pid)
        if process is None:
            return
        try:
            access = access_by(self.session.for_thread(Patience(_KEEP_SECONDS, _KEEP_SECONDS)))
            await asyncio.to_thread(keep_guest, access, process)
        except DumpError as error:
            _logger.info("where the guest has its RAM is not kept: %s", error, extra=self._extra())

    def _on_lost(self, ended: bool) -> None:
        if not ended:
            _logger.warning("the connection was lost", extra=self._extra())
            return
        if self._ends_in_peace:
            _logger.info("QEMU has ended", extra=self._extra())
        else:
            self._crash(CrashCause("qemu-died", "QEMU ended without having shut down"))
        if not self.is_collecting:
            self._spawn(self._ledger.forget())

    def _expect_end(self) -> None:
        self._ends_in_peace = True

    # What is done about it

    def _now(self) -> str:
        return utc_text(self._services.now())

    def _crash(self, cause: CrashCause, *, waits: bool = False, settles: bool = False) -> None:
        if self._intake.is_new(cause, self.stage):
            self._begin(cause, Crash(self._now(), waits=waits, settles=settles))

    def _begin(self, cause: CrashCause, crash: Crash) -> None:
        self._intake.begin(cause)
        self._run = CollectionRun(crash, self._around, self._services)
        self._collection = asyncio.create_task(self._run.run())
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
        following = None if self.is_collecting else self._intake.take_next()
        if following is not None and not self._services.ending.is_set():
            waits = waits_for_stop(following.event or {})
            self._begin(following, Crash(self._now(), waits=waits))
        if (error := task.exception()) is None:
            return
        if isinstance(error, (DumpError, CollectionGivenUpError)):
            _logger.error("not collected: %s", error, extra=self._extra())
        else:
            _logger.error("not collected", exc_info=error, extra=self._extra())


def _connect_of(guest: Guest, answer_seconds: float) -> Connect | None:
    """Return what connects to a guest; None: its address is that of its QMP socket."""
    if guest.uri is not None:
        return connector_by_libvirt(guest.domain, guest.uri)
    return None if guest.target is None else connector(guest.target, answer_seconds)


def _console_of(guest: Guest) -> ConsoleLog | None:
    settings = guest.settings
    if settings.console is None or "console" not in settings.causes:
        return None
    return ConsoleLog(Path(guest.fill(settings.console)), settings.console_patterns)
