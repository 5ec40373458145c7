"""One crash: stop the guest, take everything, let it run, prove the dump, store it.

Works in a thread of its own, through the one connection that there is to the guest. What cannot be
had is said in the record; nothing that cannot be had keeps the rest from being stored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from qemu_dump_ext.crash_collector.collect.budget import (
    CollectionGivenUpError,
    DumpAllowance,
    DumpBudget,
    Refusal,
)
from qemu_dump_ext.crash_collector.collect.dump_level import level_for_crash
from qemu_dump_ext.crash_collector.collect.evidence import Evidence, Taken, require_qemu, told
from qemu_dump_ext.crash_collector.collect.readers import (
    ReaderError,
    has_drgn,
    prove_open,
    trace_by_drgn,
)
from qemu_dump_ext.crash_collector.collect.signature import make_signature
from qemu_dump_ext.crash_collector.collect.task import CrashTask, GuestQmp, access_by
from qemu_dump_ext.crash_collector.config.settings import Settings
from qemu_dump_ext.crash_collector.record import CrashRecord, DumpFacts, Signature
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.crash_collector.watch.guests import Guest
from qemu_dump_ext.dump_formats import find_dump_format
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.dump import dump_stopped, dump_stored, prepare
from qemu_dump_ext.engine.guest_view import GuestView
from qemu_dump_ext.engine.live_guest import live_guest, snapshot_guest
from qemu_dump_ext.engine.opening import is_file
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.engine.stopped_guest import StoppedGuest, import_plug_ins, stopped_guest
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import (
    DumpError,
    DumpTooLargeError,
    DumpWriteError,
    MonitorAnswerError,
    NoRoomLeftError,
    NotLiveError,
    RequestError,
    SourceError,
)
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.interrupts import leave_signals_to_main_thread
from qemu_dump_ext.linux.system_map import functions_at
from qemu_dump_ext.pages.zero_pages import load_before_stopping
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.run_state import stopped
from qemu_dump_ext.sinks import open_sink
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_value
from qemu_dump_ext.value import Value

VERIFIER = "verify"
_logger = logging.getLogger(__name__)
_ROOM_EVERY_BYTES = 32 << 20
_RELEASE_MAX = 200


class Collected(Value):
    """A crash that is stored.

    Attributes:
        record: As it is in the store.
        dump_seconds: How long the dump took, if one was written.
        refusal: Why there must be no dump, where that is so.
    """

    record: CrashRecord
    dump_seconds: float | None = None
    refusal: Refusal | None = None


class _Meter(ProgressMeter):
    # Where a dump is given up that would fill the disk, or takes too long.
    def __init__(self, check: Callable[[int], None]) -> None:
        super().__init__(None)
        self._check = check

    def advance(self, size: int) -> None:
        super().advance(size)
        self._check(size)


class CrashCollector:
    """Collects one crash."""

    def __init__(
        self,
        task: CrashTask,
        store: CrashStore,
        budget: DumpBudget,
        *,
        set_stopped: Callable[[bool], None],
    ) -> None:
        """Prepare.

        Args:
            task: What.
            store: Where to.
            budget: Says whether there may be a dump.
            set_stopped: Remembers, on the disk, that we owe the guest to let it run again.
        """
        self._task = task
        self._settings: Settings = task.guest.settings
        self._store = store
        self._budget = budget
        self._set_stopped = set_stopped
        self._stopped_seconds = 0.0
        self._unseen = 0  # bytes that were written since the disk was looked at
        self._left: str | None = None  # what somebody else made of the guest meanwhile

    def collect(self) -> Collected:
        """Do it; returns what was stored.

        Raises:
            DumpWriteError: It cannot be stored; the guest is as it was before.
            CollectionGivenUpError: The agent ends; likewise.
        """
        leave_signals_to_main_thread()
        files = self._store.new_incoming(self._task.guest.name)
        try:
            self._budget.check_ending()
            self._task.patience.begin()
            with self._budget.collecting() as allowance:
                taken = self._prove(self._take(files, allowance), files, allowance)
                record = self._store.commit(files, self._record(taken))
        except BaseException:
            self._store.discard(files)
            raise
        return Collected(record, taken.dump_seconds, taken.refusal)

    def _take(self, files: Path, allowance: DumpAllowance) -> Taken:
        """Take all for which QEMU is needed."""
        evidence, qmp = Evidence(self._task, files), self._task.qmp
        taken = evidence.of_host(Taken())
        if qmp is None:
            return self._without_dump(taken, self._task.gone)
        try:
            with suppress(RequestError):  # which is told when the dump is taken
                prepare(self._requests(0)[0])
            access = access_by(qmp)
            import_plug_ins(access, "linux.call_trace", "linux.kernel_pages")
            with ExitStack() as captured:
                taken, guest = self._capture(captured, taken, qmp, access, files)
                taken = evidence.kernel_log(taken, qmp, guest)
                taken = self._sign(taken, guest)
                taken = self._dump(taken, qmp, guest, files, allowance)
        except (DumpWriteError, CollectionGivenUpError):
            raise
        except DumpError as error:
            taken = self._without_dump(taken, str(error))
        except Exception as error:  # noqa: BLE001 - a mistake of ours must not cost the crash
            taken = self._without_dump(taken, told(error))
        return taken

    def _prove(self, taken: Taken, files: Path, allowance: DumpAllowance) -> Taken:
        """Do all for which QEMU is no longer needed: the guest runs meanwhile."""
        signature = taken.signature or self._signature(taken.log)
        taken = replace(taken, signature=signature)
        if taken.symbols is not None and _has_file(taken.dump):
            taken = self._sign_by_dump(taken, signature, files, allowance)
        if taken.dump is not None and _has_file(taken.dump):
            taken = replace(taken, dump=self._verified(taken.dump, taken.vmcoreinfo, files))
        return taken

    def _capture(
        self, captured: ExitStack, taken: Taken, qmp: GuestQmp, access: GuestAccess, files: Path
    ) -> tuple[Taken, GuestView]:
        """Return the guest as it was at one moment, and what QEMU says of it.

        Where there is no room for a copy of it there is no dump: it stands still for the rest.
        """
        evidence = Evidence(self._task, files)
        copies = self._settings.pause != "stop"
        if copies and (refusal := self._budget.no_room()):
            taken = self._without_dump(taken, refusal.text, refusal)
        if self._settings.pause == "live" and taken.dump is None:
            try:
                live = captured.enter_context(
                    live_guest(access, files, advance=self._check, gently=True)
                )
            except NotLiveError as error:
                if not error.stands_still:
                    taken = taken.remarked(f"pause: not live, but a snapshot: {error}")
            except DumpWriteError as error:
                taken = self._without_room(taken, error)
            else:
                self._stopped_seconds = live.pause.seconds()
                return evidence.queries(evidence.registers(taken, qmp), qmp), live
        with ExitStack() as stopped_now:
            ran = stopped_now.enter_context(self._stopped(access))
            taken = evidence.queries(evidence.registers(taken, qmp), qmp)
            guest = stopped_now.enter_context(
                stopped_guest(access, self._settings.memory, inherits=False)  # the pause is ours
            )
            if ran and copies and taken.dump is None:
                try:
                    copy = captured.enter_context(snapshot_guest(guest, files, self._check))
                except DumpWriteError as error:
                    taken = self._without_room(taken, error)
                else:
                    return taken, copy  # and the guest runs again
            captured.push(stopped_now.pop_all())
            return taken, guest

    def _check(self, size: int) -> None:
        self._budget.check_ending()
        self._task.patience.check()
        self._unseen += size
        if self._unseen >= _ROOM_EVERY_BYTES:
            self._unseen = 0
            self._budget.require_room()

    @contextmanager
    def _stopped(self, access: GuestAccess) -> Iterator[bool]:
        """Keep the guest stopped; yields whether it ran."""
        load_before_stopping()
        with stopped(access, remember=self._remember_stopped, inherits=False) as pause:
            was_ours = pause.is_ours
            try:
                yield was_ours
            finally:
                self._stopped_seconds = pause.seconds() if was_ours else 0.0
        self._left = pause.left

    def _remember_stopped(self, stopped: bool) -> None:
        try:
            self._set_stopped(stopped)
        except DumpWriteError as error:
            if stopped:
                raise SourceError(f"the guest is not stopped for it: {error}") from error
            _logger.warning("%s", error)  # looked at again when the crash is stored

    def _signature(
        self, log: Sequence[str], *, functions: Sequence[str] = (), trace: Sequence[str] = ()
    ) -> Signature:
        task = self._task
        return make_signature(
            task.cause, log, functions=functions, trace=trace, message=task.message
        )

    def _sign(self, taken: Taken, guest: GuestView) -> Taken:
        # Where the log has no frames, by the dump, or else by where the vCPUs are.
        signature = self._signature(taken.log)
        if signature.frames:
            return replace(taken, signature=signature)
        vmlinux = self._kernel_file(self._settings.symbols.vmlinux, taken.vmcoreinfo)
        functions, remarks = self._functions(taken.vmcoreinfo, guest)
        return replace(
            taken.remarked(*remarks),
            signature=self._signature(taken.log, functions=functions),
            symbols=vmlinux if has_drgn() else None,
        )

    def _functions(
        self, vmcoreinfo: bytes, guest: GuestView
    ) -> tuple[Sequence[str], Sequence[str]]:
        """Return the functions in which the vCPUs are, and remarks."""
        if not vmcoreinfo:
            return (), ()
        try:
            return guest.functions_of_vcpus(guest.find_vmcoreinfo(everywhere=False)), ()
        except DumpError as error:
            remark = f"functions: {error}"
        system_map = self._kernel_file(self._settings.symbols.system_map, vmcoreinfo)
        if system_map is None:
            return (), (remark,)
        try:
            return functions_at(system_map, vmcoreinfo, guest.program_counters()), ()
        except DumpError as error:
            return (), (remark, f"symbols: {error}")

    def _kernel_file(self, template: str | None, vmcoreinfo: bytes) -> Path | None:
        release = vmcoreinfo_value(vmcoreinfo, "OSRELEASE")
        return kernel_file(self._task.guest, template, release)

    def _dump(
        self,
        taken: Taken,
        qmp: GuestQmp,
        guest: GuestView,
        files: Path,
        allowance: DumpAllowance,
    ) -> Taken:
        if taken.dump is not None:
            return taken
        settings, signature = self._settings, taken.signature
        # Two crashes of which nobody knows where they happened are not the same for that.
        tells = signature is not None and signature.frames and taken.symbols is None
        known = signature.id if signature is not None and tells else None
        asked_for = self._task.cause.kind == "trigger"
        refusal = allowance.refusal(self._task.guest, known, asked_for=asked_for)
        frames = signature.frames if signature is not None else ()
        dump_level, kept = level_for_crash(settings.dump_level, settings.keep, frames)
        requests = self._requests(dump_level)
        if refusal is not None and refusal.limit == "dumps_per_signature":
            requests, refusal = self._further(refusal, allowance)
            kept = ()
        if refusal is not None:
            return self._without_dump(taken, refusal.text, refusal)
        name = f"vmcore.{find_dump_format(settings.format).extension}"
        meter = _Meter(self._check)
        try:
            report = self._take_dump(requests, guest, files / name, meter)
        except NoRoomLeftError as error:
            return self._without_room(taken, error)
        except DumpError as error:
            if not isinstance(error, (DumpWriteError, MonitorAnswerError)):
                require_qemu(qmp)
            return self._without_dump(taken, str(error))
        left_out = tuple(
            f"vCPU {index}: {', '.join(registers)} of note {note}"
            for (note, index), registers in report.missing.items()
        )
        facts = DumpFacts(
            name,
            report.format,
            bytes=(files / name).stat().st_size,
            complete=not left_out,
            left_out=left_out,
        )
        return replace(
            taken.remarked(*report.remarks, *kept), dump=facts, dump_seconds=report.seconds
        )

    def _take_dump(
        self, requests: Sequence[DumpRequest], guest: GuestView, path: Path, meter: _Meter
    ) -> DumpReport:
        """Take the first dump that is not too large."""
        *larger, smallest = requests
        for request in larger:
            try:
                return _dump_to(path, request, guest, meter)
            except DumpTooLargeError as error:
                _logger.info("%s: %s", self._task.guest.name, error)
        return _dump_to(path, smallest, guest, meter)

    def _requests(self, dump_level: int) -> Sequence[DumpRequest]:
        """Return what is dumped, and what otherwise, where that is too large."""
        settings = self._settings
        of_windows = find_dump_format(settings.format).of_windows
        request = DumpRequest(
            format=settings.format,
            level=settings.level,
            dump_level=0 if of_windows else dump_level,
            max_bytes=settings.max_bytes,
        )
        if settings.max_bytes is None or of_windows:
            return (request,)
        return request, replace(request, dump_level=0, mini="usual")

    def _further(
        self, refusal: Refusal, allowance: DumpAllowance
    ) -> tuple[Sequence[DumpRequest], Refusal | None]:
        """Return what is dumped of a crash of which there are dumps enough, or why nothing is."""
        kind = self._settings.further_dumps
        if kind == "none" or find_dump_format(self._settings.format).of_windows:
            return (), refusal
        request = replace(
            self._requests(0)[0], dump_level=0, mini="usual" if kind == "mini" else kind
        )
        return (request,), allowance.refusal(self._task.guest, None)

    def _without_dump(self, taken: Taken, reason: str, refusal: Refusal | None = None) -> Taken:
        return taken.without_dump(reason, self._settings.format, refusal)

    def _without_room(self, taken: Taken, error: DumpWriteError) -> Taken:
        return self._without_dump(taken, str(error), Refusal("free", str(error)))

    def _sign_by_dump(
        self, taken: Taken, signature: Signature, files: Path, allowance: DumpAllowance
    ) -> Taken:
        dump, vmlinux = taken.dump, taken.symbols
        if dump is None or dump.file is None or vmlinux is None:
            return taken
        path = files / dump.file
        try:
            trace = trace_by_drgn(path, vmlinux)
        except ReaderError as error:
            taken, trace = taken.remarked(f"symbols: {error}"), ()
        if trace:
            signature = self._signature(taken.log, trace=trace)
        taken = replace(taken, signature=signature)
        if not signature.frames or self._task.cause.kind == "trigger":
            return taken
        surplus = allowance.surplus(self._task.guest, signature.id)
        if surplus is None:
            return taken
        path.unlink()
        facts = DumpFacts(None, dump.format, reason=surplus.text)
        return replace(taken, dump=facts, refusal=surplus)

    def _verified(self, facts: DumpFacts, vmcoreinfo: bytes, files: Path) -> DumpFacts:
        path = files / str(facts.file)
        problems, verified_by, budget = [], [], self._budget
        release = vmcoreinfo_value(vmcoreinfo, "OSRELEASE")
        try:
            with open_dump(path) as opened:
                release = release or opened.vmcoreinfo_facts.get("OSRELEASE")
                report = verify_dump(opened, progress=lambda _done, _all: budget.check_ending())
            problems += report.problems[:1]
        except DumpError as error:
            problems.append(str(error))
        if not problems:
            verified_by.append(VERIFIER)
        vmlinux = kernel_file(self._task.guest, self._settings.symbols.vmlinux, release)
        for reader in self._settings.verify_with:
            if (problem := prove_open(reader, path, vmlinux)) is None:
                verified_by.append(reader)
            else:
                problems.append(f"{reader} {problem}")
        return replace(
            facts,
            complete=facts.complete and VERIFIER in verified_by,
            verified_by=tuple(verified_by),
            reason="; ".join(problems) or None,
        )

    def _record(self, taken: Taken) -> CrashRecord:
        task, after = self._task, self._settings.after
        left = [self._left] if self._left else []
        also = [f"also, {count} times: {text}" for text, count in dict(task.also).items()]
        return CrashRecord(
            id="",
            guest=task.guest.name,
            labels=dict(self._settings.labels),
            time=task.time,
            cause=task.cause,
            signature=taken.signature or make_signature(task.cause, taken.log),
            dump=taken.dump or DumpFacts(None, self._settings.format, reason="not taken"),
            qemu=task.facts,
            guest_stopped_seconds=round(self._stopped_seconds, 6),
            after_action=", ".join(one if isinstance(one, str) else "command" for one in after),
            remarks=(*dict.fromkeys([*taken.remarks, *left]), *also),
            kernel=(vmcoreinfo_value(taken.vmcoreinfo, "OSRELEASE") or "")[:_RELEASE_MAX] or None,
        )


def _dump_to(path: Path, request: DumpRequest, guest: GuestView, meter: _Meter) -> DumpReport:
    with open_sink(str(path), force=False, standard_output=None) as sink:
        if isinstance(guest, StoppedGuest):
            return dump_stopped(request, guest, sink, progress=meter)
        return dump_stored(request, guest, sink, progress=meter)


def _has_file(facts: DumpFacts | None) -> bool:
    return facts is not None and facts.file is not None


def kernel_file(guest: Guest, template: str | None, release: str | None) -> Path | None:
    """Return a file of the guest's kernel that the configuration names and that is there."""
    if template is None or ("{release}" in template and (not release or "/" in release)):
        return None
    path = Path(guest.fill(template, release or ""))
    return path if is_file(path) else None
