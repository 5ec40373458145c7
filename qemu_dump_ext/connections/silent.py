"""A guest whose monitor does not answer: what of it QEMU's process has all the same.

Nothing is sent to it. A QEMU of which the main loop stands still is not even connected to: it would
take the connection when it goes on, and that of a gdbstub stops the guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qemu_dump_ext.connections.target import (
    GuestTarget,
    find_process,
    free_monitor,
    has_monitor,
    open_guest,
)
from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest.silent import LocatedGuest, SilentGuest
from qemu_dump_ext.qemu.qemu_processes import QemuProcess

_STOPPED = frozenset("Tt")
"""States of threads that somebody has stopped, by a signal or as a debugger: proc(5)."""


@contextmanager
def open_guest_or_memory(
    target: GuestTarget, *, memory_alone: bool, description: Path | None = None
) -> Iterator[GuestAccess]:
    """Connect to a guest; where its monitor does not answer, reach its memory alone.

    Args:
        target: Which.
        memory_alone: Memory is wanted also where its monitor does not answer.
        description: What was saved of it, as `SavedGuest.to_json` has it; None: what was kept, or
            else the command line and the address space of its QEMU, tell.

    Raises:
        RequestError: No guest is told, or several are called so; or the description is of another.
        SourceError: It cannot be connected to, nor is enough known of it.
    """
    process = find_process(target) if memory_alone else None
    if process is None:
        if description is not None:
            raise RequestError(
                "a description is of a guest whose monitor does not answer",
                hint="name it by --guest or --pid, with --memory process",
            )
        with open_guest(target) as access:
            yield access
        return
    if process.main_thread_state() in _STOPPED:
        reason = "its monitor does not answer: somebody has stopped QEMU itself"
        yield _by_memory(process, reason, description)
        return
    with ExitStack() as opened:
        try:
            access = opened.enter_context(open_guest(target))
        except SourceError as error:
            if has_monitor(process) and free_monitor(process) is None:
                raise  # it serves somebody else
            access = _by_memory(process, f"no monitor answers: {error}", description)
        yield access


def _by_memory(process: QemuProcess, reason: str, description: Path | None) -> GuestAccess:
    located, remarks, doubts = _known(process, description)
    states = process.thread_states()
    stands_still = bool(states) and states <= _STOPPED
    if not stands_still:
        doubts.append(
            "the guest was not stopped: what it wrote meanwhile may not fit to what was read before"
        )
    silent = SilentGuest(process.pid, reason, located, stands_still, remarks, doubts)
    return GuestAccess.by_memory(silent)


def _known(
    process: QemuProcess, description: Path | None
) -> tuple[LocatedGuest, list[str], list[str]]:
    """Return what is known of a guest; how; and what may be otherwise."""
    # For guests whose monitor does not answer, which are few.
    from qemu_dump_ext.qemu.saved_guest import SavedGuest, kept_of, load  # noqa: PLC0415

    saved: SavedGuest | None = load(description) if description else kept_of(process)
    if saved is None:
        return _seen(process)
    if not saved.is_of(process):
        raise RequestError(
            f"{description} is of another guest than process {process.pid}",
            hint="it is of a QEMU that has ended since, or of another host",
        )
    since = [f"where the guest has its RAM was written down at {saved.when}"]
    return saved.located, since, []


def _seen(process: QemuProcess) -> tuple[LocatedGuest, list[str], list[str]]:
    from qemu_dump_ext.qemu.ram_by_evidence import PLUGGED, ram_by_evidence  # noqa: PLC0415 - as above

    located = ram_by_evidence(process)
    told = f"as QEMU lays it out for a machine {located.machine.rstrip('-')} of this size"
    doubts = [f"where the guest has its RAM, and its firmware, nobody tells: it is {told}"]
    if any(map(PLUGGED.search, process.words)):
        doubts.append("memory that was plugged into the guest is not in the dump")
    return located, [], doubts
