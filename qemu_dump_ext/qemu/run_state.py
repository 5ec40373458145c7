"""Stop the guest for a dump and let it run again, whatever happens in between.

One rule: only a state that we made is undone, and only while it is still that state. A dump and a
migration exclude each other as QEMU has it. What `RUN_STATES` says of each state is done here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qemu_dump_ext.errors import (
    DumpError,
    GuestBusyError,
    GuestDisturbedError,
    MonitorAnswerError,
    PauseLimitError,
    RequestError,
    SourceError,
)
from qemu_dump_ext.guest.access import AsyncMonitor, GuestAccess
from qemu_dump_ext.host_limits import require_room, start_thread
from qemu_dump_ext.interrupts import leave_signals_to_main_thread, uninterrupted
from qemu_dump_ext.qemu.debts import Debt, debts_of
from qemu_dump_ext.qemu.guardian import Guardian
from qemu_dump_ext.qemu.monitor_queries import VERSION
from qemu_dump_ext.qemu.monitor_text import (
    RUNNING,
    parse_dump_status,
    parse_migration,
    parse_status,
    parse_version,
)
from qemu_dump_ext.qemu.pause_watch import PauseWatch
from qemu_dump_ext.qemu.process import find_qemu_process, give_way_at
from qemu_dump_ext.qemu.qemu_processes import qemu_process
from qemu_dump_ext.qemu.qmp_message import run_state
from qemu_dump_ext.qemu.run_states import (
    IDLE_MIGRATIONS,
    NO_MIGRATION,
    PAUSED,
    REFUSED_BY_MIGRATION,
    RESET,
    Treatment,
    refused_by_incoming,
    treatment,
)
from qemu_dump_ext.structures.dialect import QemuVersion
from qemu_dump_ext.value import Value

DUMP_ACTIVE = "active"
_IN_PROCESS = "dump in process"
_STOPPING_EVENTS = frozenset(("GUEST_PANICKED", "WATCHDOG"))
_RETRY_SECONDS = 0.2
_RELEASE_SECONDS = 150.0
_HURRIED_RELEASE_SECONDS = 3.0


class PauseLimit(Value):
    """How long a guest may stand still.

    Attributes:
        seconds: Since it was found stopped, or was stopped.
        hint: What makes it shorter, or None.
    """

    seconds: float
    hint: str | None = None

    def error(self) -> PauseLimitError:
        """Return what is raised when it is over."""
        return PauseLimitError(
            f"the guest had stood still for {self.seconds:g} s, the limit of --max-pause:"
            " the dump was given up",
            hint=self.hint,
        )


class Pause:
    """A guest that stands still.

    Attributes:
        started: Since when, in seconds of `time.monotonic`.
        state: Run state in which it stands still.
        is_ours: We have stopped it, and nobody has done anything else with it since.
        has_run: Somebody else has let it run since.
        left: What somebody else made of it meanwhile, in which it was left; None: nothing.
        taken_over: Who had stopped it and could not let it run again; None: nobody.
        ended_by: Why it is over before its time, or None.
    """

    def __init__(
        self, access: GuestAccess, state: str, remember: Callable[[bool], None] | None
    ) -> None:
        self.started = time.monotonic()
        self.state = state
        self.is_ours = False
        self.left: str | None = None
        self.taken_over: str | None = None
        self.ended_by: DumpError | None = None
        self._access = access
        self._remember = remember
        self._guardian: Guardian | None = None
        self._changing = threading.Lock()
        self._stands_still = False
        self.has_run = False
        self._stopped_by: str | None = None

    def seconds(self) -> float:
        """Return for how long it has stood still."""
        return time.monotonic() - self.started

    def check(self, _size: int = 0) -> None:
        """Raise what has ended the pause before its time, if anything has.

        Raises:
            DumpError: The guest may run, or be gone: what is read of it now is worth nothing.
        """
        if self.ended_by is not None:
            raise self.ended_by
        if self.has_run:
            raise GuestDisturbedError

    def hear(self, event: Mapping[str, Any]) -> None:
        """Know an event of QEMU's; called in any thread."""
        name, data = event.get("event"), event.get("data")
        action = data.get("action") if isinstance(data, Mapping) else None
        if name == "RESUME" and self._stands_still:
            self.has_run = True
        elif name == "SHUTDOWN" or (name in _STOPPING_EVENTS and action == "pause"):
            # It would have stopped the guest, had we not just before.
            self._stopped_by = name

    def stop(self) -> None:
        """Stop the guest.

        Raises:
            SourceError: It does not stop.
        """
        refusal: SourceError | None = None
        self._owe(owed=True)
        try:
            change_run_state(self._access, "stop")
        except MonitorAnswerError as error:
            refusal = error  # or an answer that makes no sense: what counts is the state
        state = read_run_state(self._access)
        if state == RUNNING:
            raise SourceError(f"the guest does not stop{f': {refusal}' if refusal else ''}")
        self._stands_still = True
        if state not in {PAUSED, RESET}:  # it stopped by itself just before
            self._owe(owed=False)
        self.state = state

    def take_over(self, debts: Sequence[Debt]) -> None:
        """Let the guest run afterwards, for who stopped it and is gone."""
        self._owe(owed=True)
        self._stands_still = True
        self.taken_over = (
            f"a dump that was killed (PID {debts[0].dumper}) had left the guest stopped:"
            " it runs again"
        )
        for debt in debts:
            debt.settle()

    def disown(self) -> None:
        """Know that somebody else has let the guest run, and stopped it, since."""
        with self._changing:
            if self.is_ours and read_run_state(self._access) == PAUSED:
                self._leave_as_it_is(PAUSED)

    def release(self) -> None:
        """Let the guest run if we have stopped it and it is still as we left it.

        Raises:
            SourceError: QEMU does not answer.
        """
        with self._changing:
            while self.is_ours:
                state = read_run_state(self._access)
                if state == RUNNING:
                    self._owe(owed=False)
                elif state == PAUSED and (self.has_run or self._stopped_by):
                    self._leave_as_it_is(f"{PAUSED} ({self._stopped_by or 'stopped'})")
                elif state in {PAUSED, RESET}:  # a reset does not stop a guest: we have
                    self._stands_still = False
                    self._resume()
                else:
                    self._leave_as_it_is(state)

    def release_within(self, seconds: float) -> None:
        """As `release`, but leave it to the guardian when QEMU has not answered by then.

        Raises:
            SourceError: QEMU does not answer.
        """
        if not self.is_ours:
            return
        if not isinstance(self._access.monitor, AsyncMonitor):  # which bears no other thread
            self.release()
            return
        failure: list[Exception] = []

        def work() -> None:
            leave_signals_to_main_thread()
            try:
                self.release()
            except Exception as error:  # noqa: BLE001 - raised in the thread that waits
                failure.append(error)

        thread = threading.Thread(target=work, name="release", daemon=True)
        if not start_thread(thread):
            self.release()
            return
        thread.join(seconds)
        if thread.is_alive() or failure:
            self._hand_over()
            reasons = [str(self.ended_by)] if self.ended_by else []
            reasons.append(str(failure[0]) if failure else "QEMU does not answer")
            raise SourceError(f"{'; '.join(reasons)}: the guest is let run as soon as QEMU answers")

    def _resume(self) -> None:
        try:
            change_run_state(self._access, "cont")
        except MonitorAnswerError as error:
            # A dump of QEMU's own, or a job of libvirt's, of somebody else.
            if isinstance(error, GuestBusyError) or _IN_PROCESS in str(error):
                time.sleep(_RETRY_SECONDS)
                return
            if read_run_state(self._access) == PAUSED:
                self._leave_as_it_is(f"{PAUSED}, for QEMU does not let it run ({error})")
                return
        self._owe(owed=False)

    def _leave_as_it_is(self, state: str) -> None:
        self.left = f"somebody else has changed the guest meanwhile: it was left {state}"
        self._owe(owed=False)

    def _owe(self, *, owed: bool) -> None:
        # What we stop is remembered before, and forgotten after it runs again.
        if self._remember is not None:
            self._remember(owed)
        elif owed and self._access.rescue is not None:
            self._guardian = Guardian(*self._access.rescue, pid=_pid_of(self._access))
        elif self._guardian is not None:
            self._guardian.dismiss()
        self.is_ours = owed

    def _hand_over(self) -> None:
        if self._guardian is None or self._access.rescue is None:
            return
        self._guardian.act()
        kind, address = self._access.rescue
        if kind != "libvirt":
            # Which a door that lives on would keep from it.
            give_way_at(address)


@contextmanager
def stopped(
    access: GuestAccess,
    *,
    limit: PauseLimit | None = None,
    remember: Callable[[bool], None] | None = None,
    inherits: bool = True,
) -> Iterator[Pause]:
    """Keep the guest stopped inside the `with` block.

    A guest that ran runs again afterwards, also after an error or an interrupt, or when this
    process is killed; one that was stopped stays as it was, and what somebody else makes of it
    meanwhile stays so as well. A migration that begins ends the block.

    Args:
        access: The ways to the guest.
        limit: Of the pause; the guest runs then, and the block ends, whatever it waits for.
        remember: Told before the guest is stopped, and when that is not to be undone any more,
            by whoever does so when this process is killed; None: a guardian does.
        inherits: A guest that a killed dump has left stopped runs afterwards. Never one that has a
            debugger, which has stopped it as well.

    Raises:
        SourceError: It cannot be stopped, or cannot be resumed, or QEMU is dumping it itself and
            would resume it in the middle.
        RequestError: QEMU refuses a dump in its run state.
        PauseLimitError: The limit was reached.
    """
    require_room()
    state = require_dumpable(access)
    pause = Pause(access, state, remember)
    watch = PauseWatch(
        pause.release_within,
        lambda: _what_ends(access, pause),
        None if limit is None else limit.error,
        deadline=None if limit is None else pause.started + limit.seconds,
        is_patient=isinstance(access.monitor, AsyncMonitor),
    )
    hurried = True
    with access.qmp.listening(pause.hear) if access.qmp else contextlib.nullcontext():
        try:
            try:
                watch.start_clock(pause)
                debts = inherited_debts(access)
                if treatment(state) is Treatment.STOP:
                    for debt in debts:  # somebody has let it run since
                        debt.settle()
                    pause.stop()
                elif state == PAUSED and debts and inherits and access.stub is None:
                    pause.take_over(debts)
                watch.start_looking(pause)
                yield pause
                watch.end()
                pause.check()
                hurried = False
            except GuestDisturbedError:
                pause.disown()
                raise
            finally:
                with uninterrupted():
                    watch.end()
                    pause.release_within(_HURRIED_RELEASE_SECONDS if hurried else _RELEASE_SECONDS)
        except KeyboardInterrupt as error:
            if pause.ended_by is not None:
                raise pause.ended_by from error
            raise


def inherited_debts(access: GuestAccess) -> Sequence[Debt]:
    """Return what dumps that are gone owe to a guest: they have stopped it."""
    pid = _pid_of(access)
    process = None if pid is None else qemu_process(pid)
    return [] if process is None else debts_of(process)


def _pid_of(access: GuestAccess) -> int | None:
    with contextlib.suppress(SourceError):
        return access.pid or find_qemu_process(access.addresses)
    return None


def require_dumpable(access: GuestAccess) -> str:
    """Return the run state of a guest.

    Raises:
        RequestError: QEMU refuses a dump in it; says so in QEMU's words.
        SourceError: QEMU dumps it itself, or does not answer.
    """
    if read_dump_status(access) == DUMP_ACTIVE:
        raise SourceError(
            "QEMU is writing a dump of its own", hint="try again when 'info dump' says completed"
        )
    state = read_run_state(access)
    refusal = why_not_dumped(
        state, read_migration(access), lambda: parse_version(access.lasting.execute(VERSION))
    )
    if refusal is not None:
        raise RequestError(refusal)
    return state


def why_not_dumped(state: str, migration: str, version: Callable[[], QemuVersion]) -> str | None:
    """Return what QEMU says to who wants to dump a guest now, or None: it does.

    Args:
        state: Run state of the guest.
        migration: Status of its migration.
        version: Asks for QEMU's.
    """
    wanted = treatment(state)
    if wanted is Treatment.REFUSE_INCOMING:
        return refused_by_incoming(version())
    if wanted is Treatment.REFUSE_MIGRATING or migration not in IDLE_MIGRATIONS:
        return REFUSED_BY_MIGRATION
    return None


def read_run_state(access: GuestAccess) -> str:
    """Return QMP's name of the run state; the human monitor tells where QMP makes no sense.

    Raises:
        SourceError: QEMU does not answer.
    """
    if access.qmp is not None:
        with contextlib.suppress(MonitorAnswerError):
            return run_state(access.qmp.begin_qmp("query-status")())
    return parse_status(access.monitor.execute("info status"))


def read_migration(access: GuestAccess) -> str:
    """Return the status of the guest's migration, `none` where there is none.

    Raises:
        SourceError: QEMU does not answer.
    """
    if access.qmp is None:
        return parse_migration(access.monitor.execute("info migrate"))
    with contextlib.suppress(MonitorAnswerError):
        answer = access.qmp.begin_qmp("query-migrate")()
        status = answer.get("status") if isinstance(answer, Mapping) else None
        return status if isinstance(status, str) else NO_MIGRATION
    return NO_MIGRATION


def read_dump_status(access: GuestAccess) -> str:
    """Return the status of QEMU's own last dump, `none` where there is none.

    Raises:
        SourceError: QEMU does not answer.
    """
    return parse_dump_status(access.monitor.execute("info dump"))


def change_run_state(access: GuestAccess, command: str) -> None:
    """Execute `stop` or `cont`.

    Raises:
        MonitorAnswerError: QEMU refuses.
        SourceError: QEMU does not answer.
    """
    if access.qmp is not None:
        access.qmp.begin_qmp(command)()
    elif "Error:" in (answer := access.monitor.execute(command)):
        raise MonitorAnswerError(command, answer)


def _what_ends(access: GuestAccess, pause: Pause) -> DumpError | None:
    """Look for what somebody else does to a guest that is to stand still."""
    state = read_run_state(access)
    if state == RUNNING or pause.has_run:
        return GuestDisturbedError()
    if state != pause.state and treatment(state) is not Treatment.LEAVE:
        return _ended_by_migration()
    # Asked while a dump of QEMU's own ends, it can crash QEMU, whose list of what forbids a
    # migration has no lock.
    if read_dump_status(access) != DUMP_ACTIVE and read_migration(access) not in IDLE_MIGRATIONS:
        return _ended_by_migration()
    return None


def _ended_by_migration() -> RequestError:
    return RequestError(
        f"{REFUSED_BY_MIGRATION}: a migration began meanwhile", hint="dump it where it runs then"
    )
