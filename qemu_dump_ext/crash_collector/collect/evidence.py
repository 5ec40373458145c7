"""What is taken of a crash besides its dump: of the host, of QEMU's monitors, of the kernel's log.

Each step gets what was taken before it, and returns that with its own; files are written at once.
What a step cannot have is a remark; that QEMU is gone is an error, and ends the steps behind it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from qemu_dump_ext.crash_collector.collect.budget import CollectionGivenUpError, Refusal
from qemu_dump_ext.crash_collector.collect.task import CrashTask, GuestQmp
from qemu_dump_ext.crash_collector.record import DumpFacts, Signature
from qemu_dump_ext.crash_collector.watch.console import read_tail
from qemu_dump_ext.engine.dmesg import read_log
from qemu_dump_ext.engine.guest_view import GuestView
from qemu_dump_ext.errors import DumpError, DumpWriteError, MonitorAnswerError
from qemu_dump_ext.qemu.qmp_message import command_names
from qemu_dump_ext.value import Value

_CONSOLE_FILE = "console.txt"
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

_T = TypeVar("_T")

_logger = logging.getLogger(__name__)


class Taken(Value):
    """What has been taken of a crash so far.

    Attributes:
        log: Lines of the kernel's log, or else of the console.
        vmcoreinfo: Text of the kernel's VMCOREINFO.
        remarks: What could not be had, one line each.
        signature: Of the crash, as far as it is known.
        symbols: The vmlinux by which the dump tells the frames that the log does not, or None.
        dump: The dump, or why there is none; None: not yet asked.
        dump_seconds: How long it took to write.
        refusal: Why there must be no dump, where that is so.
    """

    log: Sequence[str] = ()
    vmcoreinfo: bytes = b""
    remarks: Sequence[str] = ()
    signature: Signature | None = None
    symbols: Path | None = None
    dump: DumpFacts | None = None
    dump_seconds: float | None = None
    refusal: Refusal | None = None

    def remarked(self, *remarks: str) -> Taken:
        """Return this with more remarks."""
        return replace(self, remarks=(*self.remarks, *remarks))

    def without_dump(self, reason: str, dump_format: str, refusal: Refusal | None = None) -> Taken:
        """Return this without a dump, and why; where there is one, that is a remark."""
        if self.dump is not None:
            return self.remarked(reason)
        return replace(self, dump=DumpFacts(None, dump_format, reason=reason), refusal=refusal)


class Evidence:
    """Takes it for one crash."""

    def __init__(self, task: CrashTask, files: Path) -> None:
        """Prepare.

        Args:
            task: Whose crash.
            files: Directory of the crash.
        """
        self._task = task
        self._files = files

    def of_host(self, taken: Taken) -> Taken:
        """Take the console's log and QEMU's command line.

        Raises:
            DumpWriteError: It cannot be written; as all of them.
        """
        facts = self._task.facts
        words = facts.command_line or ("the command line is not known",)
        text = "\n".join((f"QEMU {facts.version} {facts.target}", *words, ""))
        self._write("qemu.txt", text.encode("utf-8", "replace"))
        template = self._task.guest.settings.console
        if template is None:
            return taken
        path = Path(self._task.guest.fill(template))
        if (tail := read_tail(path)) is None:
            return taken.remarked(f"console: {path} cannot be read")
        self._write(_CONSOLE_FILE, tail)
        return replace(taken, log=tail.decode("utf-8", "replace").splitlines())

    def registers(self, taken: Taken, qmp: GuestQmp) -> Taken:
        """Take the registers of all vCPUs, as the monitor shows them.

        Raises:
            SourceError: QEMU is gone; as of all that ask it.
        """
        text, remarks = attempt(qmp, "registers", lambda: qmp.execute("info registers -a"))
        if text is not None:
            self._write("registers.txt", text.encode("utf-8", "replace"))
        return taken.remarked(*remarks)

    def queries(self, taken: Taken, qmp: GuestQmp) -> Taken:
        """Take what QEMU answers to every question that wants no arguments."""
        names, remarks = attempt(qmp, "queries", lambda: command_names(qmp.qmp("query-commands")))
        answers = {}
        for name in sorted(names or ()):
            if not name.startswith("query-") or name in _DULL_QUERIES:
                continue
            if self._task.patience.is_slow:
                remarks = (*remarks, "queries: QEMU answers too slowly for more of them")
                break
            with contextlib.suppress(MonitorAnswerError):  # it wants arguments, or tells none
                answers[name] = qmp.qmp(name)
        self._write("queries.json", json.dumps(answers, indent=1).encode())
        return taken.remarked(*remarks)

    def kernel_log(self, taken: Taken, qmp: GuestQmp, guest: GuestView) -> Taken:
        """Take the kernel's log out of the guest's memory."""
        log, remarks = attempt(qmp, "kernel log", lambda: read_log(guest))
        if log is None:
            return taken.remarked(*remarks)
        text = "".join(f"{record.line()}\n" for record in log.records)[-_LOG_TEXT_MAX:]
        self._write("dmesg.txt", text.encode("utf-8", "replace"))
        taken = taken.remarked(*log.remarks)
        return replace(taken, log=text.splitlines() or taken.log, vmcoreinfo=log.vmcoreinfo)

    def _write(self, name: str, content: bytes) -> None:
        try:
            with (self._files / name).open("xb") as file:
                file.write(content)
        except OSError as error:
            raise DumpWriteError(f"cannot write {name}: {error.strerror}") from error


def attempt(qmp: GuestQmp, what: str, work: Callable[[], _T]) -> tuple[_T | None, Sequence[str]]:
    """Return what something gives, or else None and the remark that says why it gives nothing.

    Args:
        qmp: By which QEMU is asked.
        what: Begins the remark.
        work: Asks it.

    Raises:
        SourceError: QEMU is gone.
        DumpWriteError: Something cannot be written.
    """
    try:
        return work(), ()
    except (DumpWriteError, CollectionGivenUpError):
        raise
    except MonitorAnswerError as error:
        return None, (f"{what}: {error}",)
    except DumpError as error:
        require_qemu(qmp)
        return None, (f"{what}: {error}",)
    except Exception as error:  # noqa: BLE001 - a mistake of ours must not cost the rest
        return None, (f"{what}: {told(error)}",)


def require_qemu(qmp: GuestQmp) -> None:
    """Ask QEMU anything, for it may be gone.

    Raises:
        SourceError: It does not answer.
    """
    with contextlib.suppress(MonitorAnswerError):
        qmp.qmp("query-status")


def told(error: Exception) -> str:
    """Return what a record says of a mistake of ours, which goes to the log."""
    _logger.error("while a crash was collected", exc_info=error)
    return f"an error of the collector: {type(error).__name__}: {error}"
