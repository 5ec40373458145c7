"""The agent of a host: watches all guests, and collects their crashes."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from qemu_dump_ext.crash_collector.agent.control_socket import Answer, serve_control
from qemu_dump_ext.crash_collector.agent.journal import GuestState, Journal
from qemu_dump_ext.crash_collector.agent.service_manager import keep_alive, notify, notify_reloading
from qemu_dump_ext.crash_collector.agent.services import Services
from qemu_dump_ext.crash_collector.agent.slots import CollectionSlots
from qemu_dump_ext.crash_collector.agent.watched_guest import WatchedGuest
from qemu_dump_ext.crash_collector.collect.budget import DumpBudget
from qemu_dump_ext.crash_collector.config.settings import Configuration, GuestEntry
from qemu_dump_ext.crash_collector.outlets.metrics import AgentState
from qemu_dump_ext.crash_collector.outlets.outlets import CrashOutlets
from qemu_dump_ext.crash_collector.store.lookup import last_crash
from qemu_dump_ext.crash_collector.store.prune import prune
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.crash_collector.watch.guests import Guest, GuestFinder
from qemu_dump_ext.errors import DumpError, DumpWriteError, RequestError

_COMES_BACK_SECONDS = 10.0
_PRUNE_SECONDS = 600.0
_FIXED = (
    "store",
    "control",
    "concurrent_dumps",
    "answer_timeout",
    "collection_timeout",
    "retry_interval",
    "upload",
    "notify",
    "report",
    "metrics_port",
)
"""Words of the configuration that are read once."""

_logger = logging.getLogger(__name__)


class Agent:
    """One for each store."""

    def __init__(
        self,
        configuration: Configuration,
        reload: Callable[[], Configuration],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Prepare.

        Args:
            configuration: What to watch.
            reload: Reads it again; raises DumpError where it is wrong now.
            now: The clock of the records.
        """
        self._configuration = configuration
        self._reload = reload
        self._store = CrashStore(configuration.store)
        self._now = now
        self._finder = GuestFinder()
        self._watched: dict[str, WatchedGuest] = {}
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Watch until SIGTERM or SIGINT; SIGHUP reads the configuration again.

        Raises:
            DumpError: It cannot begin.
        """
        self._store.prepare()
        lock = self._lock_store()
        try:
            outlets = CrashOutlets(self._configuration, self._store, self._state, self._now)
            with outlets.running():
                await self._serve(outlets)
        finally:
            os.close(lock)

    def _lock_store(self) -> int:
        try:
            descriptor = os.open(
                self._configuration.store / ".agent", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise DumpWriteError(
                f"cannot use {self._configuration.store}: {error.strerror}"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise RequestError(
                f"another agent uses {self._configuration.store}", hint="one agent, one store"
            ) from error
        return descriptor

    async def _serve(self, outlets: CrashOutlets) -> None:
        for name in self._store.remove_incoming():
            _logger.warning("removed what was not complete: %s", name)
        journal = Journal(self._configuration.store / ".journal")
        budget = DumpBudget(
            self._store,
            self._configuration.limits,
            needs_upload=self._configuration.upload is not None,
        )
        slots = CollectionSlots(self._configuration.concurrent_dumps)
        self._services = Services(
            self._store,
            journal,
            budget,
            outlets,
            slots,
            self._configuration.answer_timeout,
            self._configuration.collection_timeout,
            self._configuration.retry_interval,
            self._now,
            self._stop,
        )
        left_behind = dict(journal.states)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._read_again)
        server = await serve_control(self._configuration.control_socket, self._answer)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(work)
            for work in (self._look(), self._prune(), self._record_lost(left_behind), keep_alive())
        ]
        stop: asyncio.Task[Any] = asyncio.create_task(self._stop.wait())
        try:
            await self._update_guests()
            notify("READY=1", f"STATUS=watching {len(self._watched)} guests")
            _logger.info("watching %d guests", len(self._watched))
            while not stop.done():
                running = [task for task in tasks if not task.done()]
                await asyncio.wait([stop, *running], return_when=asyncio.FIRST_COMPLETED)
                for task in running:
                    if task.done() and not task.cancelled() and task.exception() is not None:
                        raise RuntimeError("the agent is broken") from task.exception()
        finally:
            notify("STOPPING=1")
            budget.ending.set()
            self._stop.set()
            for task in (*tasks, stop):
                task.cancel()
            server.close()
            await asyncio.gather(*(watched.close() for watched in self._watched.values()))
            await asyncio.to_thread(slots.shutdown)
            self._finder.close()
            with suppress(OSError):
                self._configuration.control_socket.unlink()

    def _read_again(self) -> None:
        notify_reloading()
        try:
            configuration = self._reload()
        except DumpError as error:
            _logger.error("the configuration stays as it was: %s", error)  # noqa: TRY400
        else:
            for name in _FIXED:
                if getattr(configuration, name) != getattr(self._configuration, name):
                    _logger.warning("`%s` changes when the agent is started again", name)
                    kept = {name: getattr(self._configuration, name)}
                    configuration = replace(configuration, **kept)
            self._configuration = configuration
            self._services.budget.limits = configuration.limits
            _logger.info("the configuration was read again")
        notify("READY=1")

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._configuration.scan_interval)
            await self._update_guests()
            for watched in self._watched.values():
                watched.look_at_console()

    async def _update_guests(self) -> None:
        found = await asyncio.to_thread(self._finder.find, self._configuration)
        for name, watched in list(self._watched.items()):
            guest = found.get(name)
            vanished = guest is None and not self._is_configured(watched.guest)
            lost = guest is None and watched.session.contact is None
            changed = guest is not None and guest != watched.guest
            if (vanished or lost or changed) and not watched.is_collecting:
                del self._watched[name]
                await watched.close()
                _logger.info("no longer watched", extra={"guest": name})
        for name, guest in found.items():
            if name not in self._watched:
                self._watch(guest)

    def _is_configured(self, guest: Guest) -> bool:
        return guest.settings in self._configuration.guests

    def _watch(self, guest: Guest) -> WatchedGuest:
        watched = self._watched[guest.name] = WatchedGuest(guest, self._services)
        watched.start()
        return watched

    async def _prune(self) -> None:
        while True:
            try:
                removals = await asyncio.to_thread(
                    prune,
                    self._store,
                    self._configuration.limits,
                    now=self._now(),
                    needs_upload=self._configuration.upload is not None,
                )
            except DumpWriteError as error:
                _logger.error("%s", error)  # noqa: TRY400
            else:
                for removal in removals:
                    _logger.info("removed: %s", removal.reason, extra={"crash": removal.record.id})
            await asyncio.sleep(_PRUNE_SECONDS)

    async def _record_lost(self, left_behind: Mapping[str, GuestState]) -> None:
        """Store what is known of crashes whose QEMU does not come back."""
        await asyncio.sleep(_COMES_BACK_SECONDS)
        for name, state in left_behind.items():
            watched = self._watched.get(name)
            if state.cause is None or self._services.journal.states.get(name) != state:
                continue
            if watched is None:
                entry = GuestEntry(socket=state.qemu)
                watched = WatchedGuest(Guest(name, state.qemu, entry), self._services)
            if watched.session.contact is None:
                watched.record_lost(state, "its QEMU was gone when the agent came back")

    def _state(self) -> AgentState:
        watched = list(self._watched.values())
        return AgentState(
            watched=len(watched),
            connected=sum(one.session.contact is not None for one in watched),
            collecting=sum(one.is_collecting for one in watched),
        )

    async def _answer(self, request: Mapping[str, Any]) -> Answer:
        match request.get("command"):
            case "trigger":
                name = str(request.get("guest"))
                watched = self._watched.get(name)
                if watched is None:
                    raise RequestError(
                        f"no guest {name} is watched", hint="'guests' shows those that are"
                    )
                record = await watched.trigger(str(request.get("detail") or "somebody said so"))
                return {"id": record.id}
            case "guests":
                watched_guests = list(self._watched.values())
                states = await asyncio.gather(*(one.state() for one in watched_guests))
                return {
                    "guests": [
                        _describe(watched, state, last_crash(self._store, watched.guest.name))
                        for watched, state in zip(watched_guests, states, strict=True)
                    ]
                }
            case command:
                raise RequestError(f"the agent knows no command {command!r}")


def _describe(watched: WatchedGuest, state: str, last_crash: str | None) -> dict[str, object]:
    contact = watched.session.contact
    return {
        "name": watched.guest.name,
        "address": watched.guest.address,
        "state": state,
        "last_crash": last_crash,
        "connected": contact is not None,
        "ready": watched.is_ready,
        "collecting": watched.is_collecting,
        "pid": contact.facts.pid if contact else None,
    }
