"""One crash of a watched guest, from its first sign to what is done behind it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from qemu_dump_ext.crash_collector.agent.after_action import run_action, run_command
from qemu_dump_ext.crash_collector.agent.intake import CrashIntake
from qemu_dump_ext.crash_collector.agent.journal import GuestState
from qemu_dump_ext.crash_collector.agent.ledger import GuestLedger
from qemu_dump_ext.crash_collector.agent.services import Services
from qemu_dump_ext.crash_collector.agent.stage import Stage
from qemu_dump_ext.crash_collector.collect.collection import CrashCollector
from qemu_dump_ext.crash_collector.collect.task import CrashTask
from qemu_dump_ext.crash_collector.config.settings import AfterCommand
from qemu_dump_ext.crash_collector.record import CrashCause, CrashRecord, QemuFacts
from qemu_dump_ext.crash_collector.store.prune import prune
from qemu_dump_ext.crash_collector.watch.console import ConsoleLog
from qemu_dump_ext.crash_collector.watch.events import STOPPED_BY_QEMU
from qemu_dump_ext.crash_collector.watch.guests import Guest
from qemu_dump_ext.crash_collector.watch.patience import Patience
from qemu_dump_ext.crash_collector.watch.session import GuestSession
from qemu_dump_ext.errors import DumpError, DumpWriteError, MonitorAnswerError, SourceError
from qemu_dump_ext.value import Value

_STOP_SECONDS = 5.0
_SETTLE_SECONDS = 3.0  # from a line on the console to the panic event that often follows
_CONSOLE_SECONDS = 10.0  # at most, for one that never stops
_CONSOLE_QUIET_SECONDS = 0.5
_CONSOLE_POLL_SECONDS = 0.1
_UNKNOWN = QemuFacts("unknown", "unknown", None, None)

_logger = logging.getLogger(__name__)


class Crash(Value):
    """What is to be collected.

    Attributes:
        time: When it happened, as in records.
        again: An agent had begun with it; it may even have stored it.
        waits: QEMU stops the guest by itself in a moment.
        settles: What says better what happened may follow in a moment.
        gone: Why there is no dump, where its QEMU is gone; None: it is asked.
    """

    time: str
    again: bool = False
    waits: bool = False
    settles: bool = False
    gone: str | None = None


class Surroundings(Value):
    """Of a watched guest, as far as its crashes need them.

    Attributes:
        guest: Which one.
        session: The connection to it.
        ledger: What is remembered of it.
        intake: Knows the cause of the crash, and what else belongs to it.
        has_stopped: Set when QEMU says that the guest stands still.
        console: Its console log, or None.
        quits: Called before QEMU is told to quit, which is no crash.
        spawn: Lets something go on beside, until the guest is no longer watched.
    """

    guest: Guest
    session: GuestSession
    ledger: GuestLedger
    intake: CrashIntake
    has_stopped: asyncio.Event
    console: ConsoleLog | None
    quits: Callable[[], None]
    spawn: Callable[[Coroutine[Any, Any, None]], None]


class CollectionRun:
    """Collects one crash.

    Attributes:
        stage: Where it is.
    """

    def __init__(self, crash: Crash, around: Surroundings, services: Services) -> None:
        self.stage = Stage.SETTLING
        self._crash = crash
        self._around = around
        self._services = services

    async def run(self) -> CrashRecord:
        """Do it; returns what was stored.

        Raises:
            DumpWriteError: It cannot be stored, and nobody has it tried again.
            CollectionGivenUpError: The agent ends.
        """
        try:
            await self._settle()
            record = await self._stored()
            self.stage = Stage.STORED
            await self._around.ledger.note(cause=None, stored=record.id)
            _logger.info(
                "collected: %s, %s",
                record.signature.message,
                record.dump.file or f"no dump: {record.dump.reason}",
                extra=self._extra(crash=record.id, signature=record.signature.id),
            )
            status = await status_or_gone(self._around)
            await finish(record.id, status, self._around, self._services)
        finally:
            self.stage = Stage.ENDED
        return record

    async def _settle(self) -> None:
        crash, around = self._crash, self._around
        contact = around.session.contact if crash.gone is None else None
        instance = contact.instance if contact else around.guest.address
        await around.ledger.begin(GuestState(instance, around.intake.cause, crash.time))
        if crash.waits:
            await _at_most(_STOP_SECONDS, around.has_stopped)
        if crash.settles:
            await _at_most(_SETTLE_SECONDS, around.intake.superseded)
            if around.console is not None:
                await _until_quiet(around.console)
        if around.console is not None and crash.gone is None:
            around.console.skip()  # it tells of this crash; what comes later, of another

    async def _stored(self) -> CrashRecord:
        crash = self._crash
        if crash.again:  # by an agent that could not write that down any more
            known = self._services.store.find(self._around.guest.name, crash.time)
            if known is not None:
                return known
        while True:
            try:
                return await self._attempt()
            except DumpWriteError as error:
                self._services.outlets.crash_not_stored()
                cause = self._around.intake.cause
                if cause is not None and cause.kind == "trigger":
                    await self._around.ledger.note(cause=None)
                    raise
                _logger.error("%s; tried again later", error, extra=self._extra())  # noqa: TRY400
            self.stage = Stage.RETRYING
            await _at_most(self._services.retry_seconds, self._services.ending)
            self._services.budget.check_ending()

    async def _attempt(self) -> CrashRecord:
        around, services = self._around, self._services
        patience = Patience(services.collection_seconds, services.answer_seconds)
        collector = CrashCollector(
            self._task(patience),
            services.store,
            services.budget,
            set_stopped=around.ledger.set_stopped,
        )
        self.stage, around.ledger.is_collecting = Stage.COLLECTING, True
        try:
            collected = await services.slots.run(collector.collect, patience)
        finally:
            self.stage, around.ledger.is_collecting = Stage.RETRYING, False
            around.spawn(around.ledger.release())
        services.outlets.crash_stored(collected)
        return collected.record

    def _task(self, patience: Patience) -> CrashTask:
        session, intake, gone = self._around.session, self._around.intake, self._crash.gone
        is_there = session.contact is not None and gone is None
        return CrashTask(
            guest=self._around.guest,
            cause=intake.cause or CrashCause("trigger", ""),
            time=self._crash.time,
            facts=session.last_facts or _UNKNOWN,
            qmp=session.for_thread(patience) if is_there else None,
            gone=gone or "QEMU was gone, and its memory with it",
            also=intake.also,
            patience=patience,
        )

    def _extra(self, **more: object) -> dict[str, object]:
        return {"guest": self._around.guest.name, **more}


async def status_or_gone(around: Surroundings) -> str:
    """Return the run state of a guest; `gone` without QEMU, `unknown` where it makes no sense."""
    try:
        return await around.session.status()
    except MonitorAnswerError as error:
        _logger.warning("%s", error, extra={"guest": around.guest.name})
        return "unknown"
    except SourceError:
        return "gone"


async def finish(crash_id: str, status: str, around: Surroundings, services: Services) -> None:
    """Do what is to be done behind a crash that is stored, and remember that it is done."""
    extra = {"guest": around.guest.name, "crash": crash_id}
    if status != "gone":
        await _act(crash_id, status, around, services)
        status = await status_or_gone(around)
    await around.ledger.note(stored=None, handled=status if status in STOPPED_BY_QEMU else None)
    try:
        await asyncio.to_thread(
            prune,
            services.store,
            services.budget.limits,
            now=services.now(),
            needs_upload=services.budget.needs_upload,
        )
    except DumpWriteError as error:
        _logger.error("%s", error, extra=extra)  # noqa: TRY400


async def _act(crash_id: str, status: str, around: Surroundings, services: Services) -> None:
    for number, action in enumerate(around.guest.settings.after):
        try:
            if isinstance(action, AfterCommand):
                await run_command(action, services.store, crash_id, services.ending)
                continue
            if number:
                status = await status_or_gone(around)
            if status == "gone":
                continue
            if action == "quit":
                around.quits()
            await run_action(action, around.session, status)
        except (DumpError, OSError) as error:  # the next is done all the same
            extra = {"guest": around.guest.name, "crash": crash_id}
            _logger.error("after-action: %s", error, extra=extra)  # noqa: TRY400


async def _until_quiet(console: ConsoleLog) -> None:
    """Wait until the console says nothing more: behind the first line of a report is its trace."""
    size, quiet = console.size(), 0.0
    for _ in range(round(_CONSOLE_SECONDS / _CONSOLE_POLL_SECONDS)):
        await asyncio.sleep(_CONSOLE_POLL_SECONDS)
        quiet = quiet + _CONSOLE_POLL_SECONDS if console.size() == size else 0.0
        size = console.size()
        if quiet >= _CONSOLE_QUIET_SECONDS:
            return


async def _at_most(seconds: float, event: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
