"""The kernel's log of a guest: of a live one, or of a dump."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qemu_dump_ext.engine.guest_view import GuestView, Vmcoreinfo
from qemu_dump_ext.engine.stopped_guest import stopped_guest
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.linux.early_log import EarlyLogSearch
from qemu_dump_ext.linux.kernel_log import LogRecord, read_kernel_log
from qemu_dump_ext.value import Value


class GuestLog(Value):
    """What was found.

    Attributes:
        records: Oldest first.
        remarks: What is to be said of the way to a live guest; where the kernel's own description
            came from, if it had to be searched for.
        vmcoreinfo: That description: the text of VMCOREINFO; empty of a kernel that has none yet.
    """

    records: Sequence[LogRecord]
    remarks: Sequence[str]
    vmcoreinfo: bytes


def read_log(guest: GuestView, *, kernel: str | None = None) -> GuestLog:
    """Read the log of a guest that stands still, or the one in a dump.

    Args:
        guest: Whose log.
        kernel: Which kernel's, as `NoteSearch.find` takes it; None: the live one.

    Raises:
        SourceError: Memory cannot be read, or there is no log that can be read.
        RequestError: There is no such kernel.
        CorruptDumpError: The dump's headers or notes are damaged.
    """
    vmcoreinfo = guest.find_vmcoreinfo(kernel)
    if not vmcoreinfo.text:
        return _early_log(guest, vmcoreinfo)
    memory = guest.kernel_memory(vmcoreinfo)
    records = read_kernel_log(vmcoreinfo.text, memory.read, guest.core.byte_order, memory.word_size)
    return GuestLog(tuple(records), vmcoreinfo.remarks, vmcoreinfo.text)


def _early_log(guest: GuestView, vmcoreinfo: Vmcoreinfo) -> GuestLog:
    search = EarlyLogSearch(
        guest.memory, guest.ram_blocks, guest.core.byte_order, seconds=guest.search_seconds
    )
    found = search.find()
    if found is None:
        late = "not all of memory was searched for the log of a kernel that is booting"
        reasons = (*vmcoreinfo.remarks, late) if search.gave_up else vmcoreinfo.remarks
        raise SourceError("; ".join(reasons), hint="is it a Linux guest?")
    late = ", which were not found in time" if search.gave_up else ""
    stamps = "" if found.has_stamps else f", without the times of its lines{late}"
    remark = (
        "the kernel is still booting, or was built without VMCOREINFO: its log was found by its"
        f" form at {found.gpa:#x}{stamps}"
    )
    return GuestLog(found.records, (*vmcoreinfo.remarks, remark), b"")


def log_of_guest(access: GuestAccess, *, memory: str, kernel: str | None) -> GuestLog:
    """Read the log of a live guest, which is stopped meanwhile; otherwise as `read_log`.

    Args:
        access: The ways to the guest.
        memory: Name of the memory source, or `auto`.
        kernel: Which kernel's.
    """
    with stopped_guest(access, memory) as guest:
        log = read_log(guest, kernel=kernel)
        return replace(log, remarks=(*guest.remarks, *log.remarks))
