"""One guest under the agent's eyes: what happens to it, and what is done about it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qemu_dump_ext.crash_collector.configuration import AfterCommand
from qemu_dump_ext.crash_collector.console_watch import ConsoleLog
from qemu_dump_ext.crash_collector.crash_collection import (
    CrashCollector,
    CrashTask,
    crash_environment,
)
from qemu_dump_ext.crash_collector.crash_events import (
    STOPPED_BY_QEMU,
    Event,
    cause_of_event,
    cause_of_status,
    waits_for_stop,
)
from qemu_dump_ext.crash_collector.crash_outlets import CrashOutlets
from qemu_dump_ext.crash_collector.crash_record import (
    CrashCause,
    CrashRecord,
    QemuFacts,
    utc_text,
)
from qemu_dump_ext.crash_collector.crash_store import CrashStore
from qemu_dump_ext.crash_collector.dump_budget import CollectionGivenUpError, DumpBudget, prune
from qemu_dump_ext.crash_collector.guest_session import GuestSession, panic_action
from qemu_dump_ext.crash_collector.guest_watch import Guest
from qemu_dump_ext.crash_collector.heartbeat import watch_progress
from qemu_dump_ext.crash_collector.journal import GuestState, Journal
from qemu_dump_ext.errors import DumpError, DumpWriteError, RequestError, SourceError

_STOP_SECONDS = 5.0
_SETTLE_SECONDS = 3.0  # from a line on the console to the panic event that often follows
_OUTPUT_MAX = 2000
_ALSO_MAX = 20
_RECORDS_PER_DUMP = 10
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
        pool: Threads that collect: as many as there may be dumps at the same time.
        answer_seconds: How long QEMU may take to answer.
        retry_seconds: Until a crash that could not be stored is collected again.
        now: The clock of the records.
        ending: Set when the agent ends.
    """

    store: CrashStore
    journal: Journal
    budget: DumpBudget
    outlets: CrashOutlets
    pool: Executor
    answer_seconds: float
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
        self._cause: CrashCause | None = None
        self._also: Counter[str] = Counter()
        self._recent: deque[float] = deque()
        self._only_counted = 0
        self._is_stored = False
        self._next: CrashCause | None = None
        self._has_stopped = asyncio.Event()
        self._superseded = asyncio.Event()
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
            state = self._journal.states.get(self.guest.name)
            if state is not None and state.stopped and status == "paused":
                await self._resume_owed()
            elif cause := cause_of_status(status):
                self._crash(cause)

    def _on_still(self, seconds: float) -> None:
        how = self.guest.settings.heartbeat
        by = how.by if how else ""
        self._crash(CrashCause("no-progress", f"{by}: nothing has changed for {seconds:.0f} s"))

    async def _on_contact(self) -> None:
        contact = self.session.contact
        if contact is None:
            return
        self._shut_down = False
        _logger.info("connected: QEMU %s", contact.facts.version, extra=self._extra())
        await self._require_pause(contact.facts)
        status = await self.session.status()
        state = self._journal.states.get(self.guest.name)
        if state is not None and state.qemu != contact.instance:
            self.record_lost(state, "its QEMU was gone when the agent came back")
            if state.cause is None:
                await self._forget()
            state = None
        if self.is_collecting:
            return
        if state is not None and state.stopped and status == "paused":
            await self._resume_owed()
            status = await self.session.status()
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

    async def _require_pause(self, facts: QemuFacts) -> None:
        action = panic_action(facts.command_line or ())
        if action == "none":
            return
        try:
            # Also where QEMU was started so: somebody may have changed it since.
            await self.session.qmp("set-action", {"panic": "pause"})
        except SourceError as error:
            if action != "pause":
                _logger.warning(
                    "a panic ends this guest before it can be dumped: start QEMU with"
                    " -action panic=pause (%s)",
                    error,
                    extra=self._extra(),
                )
            return
        if action != "pause":
            _logger.warning(
                "QEMU was to %s on a panic; it pauses the guest now: start it with"
                " -action panic=pause",
                action,
                extra=self._extra(),
            )

    async def _resume_owed(self) -> None:
        await self.session.qmp("cont")
        await self._note(stopped=False)
        _logger.warning("we had stopped the guest: it runs again", extra=self._extra())

    # What is done about it

    def _crash(self, cause: CrashCause, *, waits: bool = False, settle: bool = False) -> None:
        if cause.kind not in self.guest.settings.causes:
            _logger.debug("not a crash here: %s", cause.detail, extra=self._extra())
        elif not self.is_collecting:
            if not self._is_too_many():
                self._begin(cause, waits=waits, settle=settle)
        elif self._is_stored:
            # Of the guest after what was done about its last crash.
            if self._next is None and not self._is_too_many():
                self._next = cause
        elif self._cause is not None and self._cause.kind == "console" and not settle:
            self._also[f"{self._cause.kind}: {self._cause.detail}"] += 1
            self._cause = cause
            self._superseded.set()
        elif len(self._also) < _ALSO_MAX:
            self._also[f"{cause.kind}: {cause.detail}"] += 1
        else:
            self._also["more, only counted"] += 1

    def _is_too_many(self) -> bool:
        # A guest must not fill the store, nor push the crashes of others out of it.
        rate, now = self.guest.settings.rate, asyncio.get_running_loop().time()
        while self._recent and now - self._recent[0] > rate.per:
            self._recent.popleft()
        if len(self._recent) < _RECORDS_PER_DUMP * rate.dumps:
            self._recent.append(now)
            return False
        if not self._only_counted:
            _logger.error("crashes too often: more are only counted", extra=self._extra())
        self._only_counted += 1
        return True

    def _begin(
        self,
        cause: CrashCause,
        *,
        time: str | None = None,
        waits: bool = False,
        settle: bool = False,
        gone: str | None = None,
    ) -> None:
        _logger.warning("crash: %s", cause.detail, extra=self._extra(cause=cause.kind))
        self._cause, self._also = cause, Counter()
        if self._only_counted:
            self._also["crashed too often: only counted"] = self._only_counted
            self._only_counted = 0
        self._is_stored = False
        self._superseded.clear()
        time = time or utc_text(self._services.now())
        self._collection = asyncio.create_task(
            self._collect(time, waits=waits, settle=settle, gone=gone)
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
        following, self._next = self._next, None
        if following is not None and not self._services.ending.is_set():
            self._begin(following, waits=waits_for_stop(following.event or {}))
        if (error := task.exception()) is None:
            return
        if isinstance(error, (DumpError, CollectionGivenUpError)):
            _logger.error("not collected: %s", error, extra=self._extra())
        else:
            _logger.error("not collected", exc_info=error, extra=self._extra())

    async def _collect(
        self, time: str, *, waits: bool, settle: bool, gone: str | None
    ) -> CrashRecord:
        contact = self.session.contact if gone is None else None
        instance = contact.instance if contact else self.guest.address
        state = GuestState(instance, self._cause, time)
        with suppress(DumpWriteError):
            await asyncio.to_thread(self._journal.set, self.guest.name, state)
        if waits:
            await _at_most(_STOP_SECONDS, self._has_stopped)
        if settle:
            await _at_most(_SETTLE_SECONDS, self._superseded)
        if self._console is not None and gone is None:
            self._console.skip()  # it tells of this crash; what comes later, of another
        record = await self._store_crash(time, gone)
        self._is_stored = True
        await self._note(cause=None, stored=record.id)
        _logger.info(
            "collected: %s, %s",
            record.signature.message,
            record.dump.file or f"no dump: {record.dump.reason}",
            extra=self._extra(crash=record.id, signature=record.signature.id),
        )
        with suppress(SourceError):
            status = await self.session.status() if self.session.contact else "gone"
            await self._finish(record.id, status)
        return record

    async def _store_crash(self, time: str, gone: str | None) -> CrashRecord:
        loop = asyncio.get_running_loop()
        while True:
            contact = self.session.contact if gone is None else None
            task = CrashTask(
                guest=self.guest,
                cause=self._cause or CrashCause("trigger", ""),
                time=time,
                facts=self.session.last_facts or _UNKNOWN,
                qmp=self.session.for_thread() if contact else None,
                gone=gone or "QEMU was gone, and its memory with it",
                also=self._also,
            )
            collector = CrashCollector(
                task, self._services.store, self._services.budget, set_stopped=self._set_stopped
            )
            try:
                record = await loop.run_in_executor(self._services.pool, collector.collect)
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
            status = await self.session.status() if self.session.contact else "gone"
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

    async def _act(self, crash_id: str, status: str) -> None:
        action = self.guest.settings.after
        if isinstance(action, AfterCommand):
            await self._run_command(action, crash_id)
        elif action == "resume" and status != "running":
            await self.session.qmp("cont")
        elif action == "reset":
            await self.session.qmp("system_reset")
            if status != "running":
                await self.session.qmp("cont")
        elif action == "quit":
            self._shut_down = True
            with suppress(SourceError):
                await self.session.qmp("quit")

    async def _run_command(self, action: AfterCommand, crash_id: str) -> None:
        store = self._services.store
        environment = crash_environment(store.record(crash_id), store.directory(crash_id))
        process = await asyncio.create_subprocess_exec(
            *action.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        talk = asyncio.create_task(process.communicate())
        ending = asyncio.create_task(self._services.ending.wait())
        try:
            await asyncio.wait(
                [talk, ending], timeout=action.timeout, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ending.cancel()
            if not talk.done():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        output, _ = await talk
        _logger.log(
            logging.ERROR if process.returncode else logging.INFO,
            "%s ended with status %s: %s",
            action.command[0],
            process.returncode,
            output.decode("utf-8", "replace")[-_OUTPUT_MAX:].strip(),
            extra=self._extra(crash=crash_id),
        )


async def _at_most(seconds: float, event: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
