"""One crash: stop the guest, take everything, let it run, prove the dump, store it.

Works in a thread of its own, through the one connection that there is to the guest. What cannot be
had is said in the record; nothing that cannot be had keeps the rest from being stored.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qemu_dump_ext.crash_collector.collect.budget import DumpAllowance, DumpBudget
from qemu_dump_ext.crash_collector.collect.readers import (
    ReaderError,
    has_drgn,
    prove_open,
    trace_by_drgn,
)
from qemu_dump_ext.crash_collector.collect.signature import make_signature
from qemu_dump_ext.crash_collector.config.settings import Settings
from qemu_dump_ext.crash_collector.record import (
    CrashCause,
    CrashRecord,
    DumpFacts,
    QemuFacts,
    Signature,
)
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.crash_collector.watch.console import read_tail
from qemu_dump_ext.crash_collector.watch.guests import Guest
from qemu_dump_ext.crash_collector.watch.patience import Patience
from qemu_dump_ext.dump_formats import find_dump_format
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.dmesg import GuestLog, read_log
from qemu_dump_ext.engine.dump import dump_stopped, prepare
from qemu_dump_ext.engine.stopped_guest import StoppedGuest, stopped_guest
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import (
    DumpError,
    DumpWriteError,
    MonitorAnswerError,
    RequestError,
    SourceError,
)
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.interrupts import leave_signals_to_main_thread
from qemu_dump_ext.linux.system_map import functions_at
from qemu_dump_ext.pages.zero_pages import load_before_stopping
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.qmp import SharedQmp
from qemu_dump_ext.qemu.qmp_message import command_names
from qemu_dump_ext.qemu.run_state import stopped
from qemu_dump_ext.sinks import open_sink
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_value

VERIFIER = "verify"
_logger = logging.getLogger(__name__)
_ROOM_EVERY_BYTES = 32 << 20
_LOG_TEXT_MAX = 64 << 20
# Large, and the same for every QEMU of this version.
_DULL_QUERIES = frozenset(
    (
        "query-qmp-schema",
        "query-commands",
        "query-command-line-options",
        "query-cpu-definitions",
        "query-machines",
        "query-dump-guest-memory-capability",
    )
)


@dataclass(frozen=True)
class CrashTask:
    """What is to be collected.

    Attributes:
        guest: Whose crash.
        cause: Why it counts.
        time: When it happened, as in records.
        facts: About its QEMU.
        qmp: The connection; None: QEMU is gone.
        gone: Why there is none.
        also: What else happened meanwhile, and how often; still counts.
        patience: For how long QEMU is asked; begins with the collection.
    """

    guest: Guest
    cause: CrashCause
    time: str
    facts: QemuFacts
    qmp: SharedQmp | None
    gone: str
    also: Mapping[str, int]
    patience: Patience


@dataclass
class _Found:
    # What has been found so far.
    log: Sequence[str] = ()
    vmcoreinfo: bytes = b""
    remarks: list[str] = field(default_factory=list)
    stopped_seconds: float = 0.0
    dump: DumpFacts | None = None
    signature: Signature | None = None
    symbols: Path | None = None  # by which the dump tells the frames that the log does not


class _Meter(ProgressMeter):
    # Where a dump is given up that would fill the disk, or takes too long.
    def __init__(self, budget: DumpBudget, patience: Patience) -> None:
        super().__init__(None)
        self._budget = budget
        self._patience = patience
        self._unseen = 0

    def advance(self, size: int) -> None:
        super().advance(size)
        self._budget.check_ending()
        self._patience.check()
        self._unseen += size
        if self._unseen >= _ROOM_EVERY_BYTES:
            self._unseen = 0
            self._budget.require_room()


class CrashCollector:
    """Collects one crash.

    Attributes:
        dump_seconds: How long the dump took, if one was written.
    """

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
        self._found = _Found()
        self.dump_seconds: float | None = None
        self._files: Path = Path()
        self._allowance = DumpAllowance(budget)

    def collect(self) -> CrashRecord:
        """Do it; returns what was stored.

        Raises:
            DumpWriteError: It cannot be stored; the guest is as it was before.
            CollectionGivenUpError: The agent ends; likewise.
        """
        leave_signals_to_main_thread()
        self._files = self._store.new_incoming(self._task.guest.name)
        try:
            self._budget.check_ending()
            self._task.patience.begin()
            with self._budget.collecting() as self._allowance:
                self._take_everything()
                return self._store.commit(self._files, self._record())
        except BaseException:
            self._store.discard(self._files)
            raise

    def _take_everything(self) -> None:
        self._take_console()
        try:
            if self._task.qmp is None:
                self._without_dump(self._task.gone)
            else:
                with suppress(RequestError):  # which is told when the dump is taken
                    prepare(self._request())
                with self._stopped(self._task.qmp):
                    self._take_from_qemu(self._task.qmp)
        except DumpWriteError:
            raise
        except DumpError as error:
            self._without_dump(str(error))
        except Exception as error:  # noqa: BLE001 - a mistake of ours must not cost the crash
            self._without_dump(_told(error))
        self._found.signature = self._found.signature or self._sign(None)
        if self._found.dump is not None and self._found.dump.file is not None:
            self._found.dump = self._signed(self._found.dump)
        if self._found.dump is not None and self._found.dump.file is not None:
            self._found.dump = self._verified(self._found.dump)

    @contextmanager
    def _stopped(self, qmp: SharedQmp) -> Iterator[None]:
        load_before_stopping()
        with stopped(GuestAccess.by_qmp(qmp), remember=self._remember_stopped) as pause:
            was_ours = pause.is_ours
            try:
                yield
            finally:
                self._found.stopped_seconds = pause.seconds() if was_ours else 0.0
        if pause.left:
            self._found.remarks.append(pause.left)

    def _remember_stopped(self, stopped: bool) -> None:
        try:
            self._set_stopped(stopped)
        except DumpWriteError as error:
            if stopped:
                raise SourceError(f"the guest is not stopped for it: {error}") from error
            _logger.warning("%s", error)  # looked at again when the crash is stored

    def _take_from_qemu(self, qmp: SharedQmp) -> None:
        access = GuestAccess.by_qmp(qmp)
        for take in (self._take_registers, self._take_queries):
            take(qmp)
        try:
            with stopped_guest(access, self._settings.memory) as guest:
                self._take_from_guest(qmp, guest)
        except DumpWriteError:
            raise
        except DumpError as error:
            qmp.qmp("query-status")
            self._found.remarks.append(f"kernel log: {error}")
            self._without_dump(str(error))

    def _take_from_guest(self, qmp: SharedQmp, guest: StoppedGuest) -> None:
        self._take_log(qmp, guest)
        self._found.signature = self._sign(guest)
        self._take_dump(qmp, guest)

    def _try(self, qmp: SharedQmp, what: str, work: Callable[[], Any]) -> Any:
        # What one question does not give is a remark; that QEMU is gone ends everything.
        try:
            return work()
        except DumpWriteError:
            raise
        except MonitorAnswerError as error:
            self._found.remarks.append(f"{what}: {error}")
        except DumpError as error:
            _require_qemu(qmp)
            self._found.remarks.append(f"{what}: {error}")
        except Exception as error:  # noqa: BLE001 - a mistake of ours must not cost the rest
            self._found.remarks.append(f"{what}: {_told(error)}")
        return None

    def _take_registers(self, qmp: SharedQmp) -> None:
        text = self._try(qmp, "registers", lambda: qmp.execute("info registers -a"))
        if text is not None:
            self._write("registers.txt", text.encode())

    def _take_queries(self, qmp: SharedQmp) -> None:
        def ask() -> list[str]:
            return command_names(qmp.qmp("query-commands"))

        answers = {}
        for name in sorted(self._try(qmp, "queries", ask) or ()):
            if self._task.patience.is_slow:
                self._found.remarks.append("queries: QEMU answers too slowly for more of them")
                break
            if name.startswith("query-") and name not in _DULL_QUERIES:
                with contextlib.suppress(MonitorAnswerError):  # it wants arguments, or tells none
                    answers[name] = qmp.qmp(name)
        self._write("queries.json", json.dumps(answers, indent=1).encode())

    def _take_log(self, qmp: SharedQmp, guest: StoppedGuest) -> None:
        log: GuestLog | None = self._try(qmp, "kernel log", lambda: read_log(guest))
        if log is None:
            return
        self._found.vmcoreinfo = log.vmcoreinfo
        self._found.remarks += log.remarks
        text = "".join(f"{record.line()}\n" for record in log.records)[-_LOG_TEXT_MAX:]
        self._found.log = text.splitlines()
        self._write("dmesg.txt", text.encode("utf-8", "replace"))

    def _take_console(self) -> None:
        template = self._settings.console
        if template is not None:
            path = Path(self._task.guest.fill(template))
            if (tail := read_tail(path)) is not None:
                self._write("console.txt", tail)
            else:
                self._found.remarks.append(f"console: {path} cannot be read")
        facts = self._task.facts
        words = facts.command_line or ("the command line is not known",)
        self._write(
            "qemu.txt", "\n".join((f"QEMU {facts.version} {facts.target}", *words, "")).encode()
        )

    def _sign(self, guest: StoppedGuest | None) -> Signature:
        log = self._log()
        signature = make_signature(self._task.cause, log)
        if signature.frames or guest is None:
            return signature
        self._found.symbols = self._dump_symbols()
        return make_signature(self._task.cause, log, functions=self._functions(guest))

    def _log(self) -> Sequence[str]:
        console = self._files / "console.txt"
        if self._found.log or not console.exists():
            return self._found.log
        return console.read_text("utf-8", "replace").splitlines()

    def _dump_symbols(self) -> Path | None:
        path = self._kernel_file(self._settings.symbols.vmlinux)
        return path if path is not None and has_drgn() else None

    def _signed(self, facts: DumpFacts) -> DumpFacts:
        # Where the log has no frames, by those that the dump has.
        found = self._found
        if found.symbols is None or found.signature is None:
            return facts
        try:
            trace = trace_by_drgn(self._files / str(facts.file), found.symbols)
        except ReaderError as error:
            found.remarks.append(f"symbols: {error}")
            trace = ()
        if trace:
            found.signature = make_signature(self._task.cause, self._log(), trace=trace)
        surplus = self._allowance.surplus(self._task.guest, found.signature.id)
        if surplus is None:
            return facts
        (self._files / str(facts.file)).unlink()
        return DumpFacts(None, facts.format, reason=surplus)

    def _functions(self, guest: StoppedGuest) -> Sequence[str]:
        system_map = self._kernel_file(self._settings.symbols.system_map)
        if system_map is None or not self._found.vmcoreinfo:
            return ()
        try:
            return functions_at(system_map, self._found.vmcoreinfo, guest.program_counters())
        except DumpError as error:
            self._found.remarks.append(f"symbols: {error}")
            return ()

    def _kernel_file(self, template: str | None) -> Path | None:
        release = vmcoreinfo_value(self._found.vmcoreinfo, "OSRELEASE")
        return kernel_file(self._task.guest, template, release)

    def _take_dump(self, qmp: SharedQmp, guest: StoppedGuest) -> None:
        signature, settings = self._found.signature, self._settings
        if signature is None:
            return
        known = signature.id if self._found.symbols is None else None
        refusal = self._allowance.refusal(self._task.guest, known)
        if refusal is not None:
            self._without_dump(refusal)
            return
        name = f"vmcore.{find_dump_format(settings.format).extension}"
        meter = _Meter(self._budget, self._task.patience)
        try:
            sink = open_sink(str(self._files / name), force=False, standard_output=None)
            with sink:
                report = dump_stopped(self._request(), guest, sink, progress=meter)
        except DumpError as error:
            self._without_dump(str(error))
            if not isinstance(error, (DumpWriteError, MonitorAnswerError)):
                _require_qemu(qmp)
            return
        self.dump_seconds = report.seconds
        left_out = tuple(
            f"vCPU {index}: {', '.join(registers)} of note {note}"
            for (note, index), registers in report.missing.items()
        )
        self._found.remarks += report.remarks
        self._found.dump = DumpFacts(
            name,
            report.format,
            bytes=(self._files / name).stat().st_size,
            complete=not left_out,
            left_out=left_out,
        )

    def _request(self) -> DumpRequest:
        settings = self._settings
        return DumpRequest(
            format=settings.format, level=settings.level, dump_level=settings.dump_level
        )

    def _without_dump(self, reason: str) -> None:
        if self._found.dump is None:
            self._found.dump = DumpFacts(None, self._settings.format, reason=reason)
        else:
            self._found.remarks.append(reason)

    def _verified(self, facts: DumpFacts) -> DumpFacts:
        path = self._files / str(facts.file)
        problems, verified_by, budget = [], [], self._budget
        release = vmcoreinfo_value(self._found.vmcoreinfo, "OSRELEASE")
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

    def _record(self) -> CrashRecord:
        task, found = self._task, self._found
        after = self._settings.after
        also = [f"also, {count} times: {text}" for text, count in dict(task.also).items()]
        return CrashRecord(
            id="",
            guest=task.guest.name,
            labels=dict(self._settings.labels),
            time=task.time,
            cause=task.cause,
            signature=found.signature or self._sign(None),
            dump=found.dump or DumpFacts(None, self._settings.format, reason="not taken"),
            qemu=task.facts,
            guest_stopped_seconds=round(found.stopped_seconds, 6),
            after_action=after if isinstance(after, str) else "command",
            remarks=(*dict.fromkeys(found.remarks), *also),
        )

    def _write(self, name: str, content: bytes) -> None:
        try:
            with (self._files / name).open("xb") as file:
                file.write(content)
        except OSError as error:
            raise DumpWriteError(f"cannot write {name}: {error.strerror}") from error


def _require_qemu(qmp: SharedQmp) -> None:
    """Ask QEMU anything, for it may be gone.

    Raises:
        SourceError: It does not answer.
    """
    with contextlib.suppress(MonitorAnswerError):
        qmp.qmp("query-status")


def _told(error: Exception) -> str:
    _logger.error("while a crash was collected", exc_info=error)
    return f"an error of the collector: {type(error).__name__}: {error}"


def kernel_file(guest: Guest, template: str | None, release: str | None) -> Path | None:
    """Return a file of the guest's kernel that the configuration names and that is there."""
    if template is None or ("{release}" in template and (not release or "/" in release)):
        return None
    path = Path(guest.fill(template, release or ""))
    return path if path.is_file() else None
