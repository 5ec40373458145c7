"""The one use case: take a dump of a guest. Every door calls `dump`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from qemu_dump_ext.architectures import Translation
from qemu_dump_ext.dump_formats import all_dump_formats
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.errors import NotDumpedByQemuError, PauseLimitError, SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.linux.kernel_memory import read_utsname
from qemu_dump_ext.linux.vmcoreinfo_search import NoteSearch
from qemu_dump_ext.memory_sources import open_memory
from qemu_dump_ext.pages.copied_memory import CopiedMemory, room_for_copy
from qemu_dump_ext.paging.segments import Segment
from qemu_dump_ext.paging.tables import (
    TableReader,
    collect_mappings,
    kernel_translations,
    roots_of_vcpus,
)
from qemu_dump_ext.plan.plan import GuestSnapshot, make_plan, select_blocks
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.probe import ProbedGuest, check_undisturbed, probe_guest
from qemu_dump_ext.qemu.run_state import stopped
from qemu_dump_ext.sinks import Sink
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.dialect import MENDED, Dialect, qemu_dialect
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_text


def dump(
    request: DumpRequest,
    access: GuestAccess,
    sink: Sink,
    *,
    memory: str,
    progress: ProgressMeter,
) -> DumpReport:
    """Take a dump.

    The guest is stopped while its memory is read and, if it ran before, runs again afterwards,
    whatever happens. `sink` holds a complete dump when this returns; making it final is up to
    the caller, who also removes it after an error.

    Args:
        request: What to write.
        access: The ways to the guest.
        sink: Where to write.
        memory: Name of the memory source, or `auto`.
        progress: Is told of every piece of guest memory.

    Raises:
        RequestError: The request is impossible.
        NotDumpedByQemuError: It is to be exact, and QEMU refuses the target; nothing was written.
        SourceError: The guest cannot be reached, or was lost.
        DumpWriteError: The dump cannot be written.
    """
    dump_format = all_dump_formats()["elf" if request.codec is None else "kdump"]
    dump_format.check(request, sink)
    started = time.monotonic()
    copied: CopiedMemory | None = None
    with ExitStack() as copies:
        with stopped(access.monitor):
            pause = _Pause(request)
            guest = probe_guest(access)
            dialect = _native_dialect(guest) if request.exact else MENDED
            select_blocks(guest.ram_blocks, dialect, request, guest.architecture.page_size)
            context = access.source_context(guest.ram_blocks)
            with open_memory(memory, context) as opened:
                snapshot, remarks = _complete(guest, opened.memory, request, pause.check)
                plan = make_plan(snapshot, dialect, request)
                progress.start(plan.memory_size)
                pause.check(0)
                if request.snapshot:
                    copied = copies.enter_context(
                        room_for_copy(opened.memory, plan.ram_blocks, sink.directory)
                    )
                    copied.take(opened.memory, plan.ram_blocks, pause.check)
                else:

                    def advance(size: int) -> None:
                        pause.check(size)
                        progress.advance(size)

                    dump_format.write(request, plan, opened.memory, sink, advance)
            check_undisturbed(access.monitor, guest)
        stopped_seconds = pause.seconds()
        if copied is not None:
            remarks.append(f"{copied.size >> 20} MiB of guest memory were copied {copied.where}")
            progress.start(plan.memory_size)
            dump_format.write(request, plan, copied, sink, progress.advance)
    ended = time.monotonic()
    return DumpReport(
        target=sink.name,
        format=request.format_name,
        memory_size=plan.memory_size,
        bytes_written=sink.bytes_written,
        seconds=ended - started,
        stopped_seconds=stopped_seconds,
        memory_source=opened.memory.name,
        passed_over=opened.passed_over,
        missing=plan.missing,
        remarks=(*remarks, *plan.remarks),
        doubts=guest.doubts,
    )


def _native_dialect(guest: ProbedGuest) -> Dialect:
    dialect = qemu_dialect(guest.version)
    since = guest.architecture.dumped_by_qemu_since
    if since is None or guest.version < since:
        raise NotDumpedByQemuError(
            f"--exact: {dialect.name} itself does not dump {guest.architecture.name} guests",
            hint="without --exact, they are dumped as their Linux does it",
        )
    return dialect


def _map_memory(
    guest: ProbedGuest, memory: GuestMemory, request: DumpRequest, vmcoreinfo: bytes
) -> tuple[list[Segment] | None, list[str]]:
    """Return what the page tables map, and remarks."""
    architecture, native = guest.architecture, request.exact
    roots: list[Translation] = []
    remarks: list[str] = []
    try:
        roots += roots_of_vcpus(architecture, guest.vcpus, native=native)
    except SourceError as error:
        if native:
            raise
        remarks.append(f"{error}: the page tables of processes are left out")
    if not native:
        # A vCPU that runs a process may have tables without the kernel in them.
        roots += kernel_translations(architecture, vmcoreinfo, guest.ram_blocks)
        if architecture.page_table_roots is None and roots:
            remarks.append(
                f"of {architecture.name}, only the kernel's own addresses are known: those of"
                " processes are left out"
            )
    if not roots:
        remarks.append("no vCPU uses paging that we know: virtual addresses are physical ones")
        return None, remarks
    ranges = [(block.gpa, block.end) for block in guest.ram_blocks]
    if native:
        ranges = list(guest.readable_ranges)
    reader = TableReader(memory, guest.ram_blocks)
    return collect_mappings(roots, reader, ranges, native=native), remarks


def _kernel_note(
    guest: ProbedGuest,
    memory: GuestMemory,
    request: DumpRequest,
    byte_order: ByteOrder,
    advance: Callable[[int], None],
) -> tuple[bytes, list[str]]:
    """Return the note that the dump shall have behind those of the vCPUs, and remarks."""
    if not request.vmcoreinfo:
        return b"", []
    known = guest.guest_note
    # With --exact, no note is what QEMU would have.
    if known is not None and request.kernel is None and (known or request.exact):
        return known, []
    search = NoteSearch(
        guest.architecture, byte_order, memory, guest.ram_blocks, guest.vcpus, advance=advance
    )
    result = search.find(request.kernel)
    remarks = list(result.remarks)
    if known is None:
        remarks.append(f"QEMU's own VMCOREINFO: {guest.native_refusal}")
    return (result.chosen.note if result.chosen else b""), remarks


class _Pause:
    # How long the guest has been kept stopped.
    def __init__(self, request: DumpRequest) -> None:
        self._started = time.monotonic()
        self._limit = request.max_pause
        self._hint = None if request.snapshot else "--snapshot is shorter"

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def check(self, _size: int) -> None:
        if self._limit is not None and self.seconds() > self._limit:
            raise PauseLimitError(
                f"the guest had stood still for {self._limit:g} s, the limit of --max-pause:"
                " the dump was given up",
                hint=self._hint,
            )


def _complete(
    guest: ProbedGuest,
    memory: GuestMemory,
    request: DumpRequest,
    advance: Callable[[int], None],
) -> tuple[GuestSnapshot, list[str]]:
    """Add what only guest memory tells: the kernel's note where QEMU's is out of reach, uname."""
    core = guest.architecture.select_core(guest.vcpus, guest.ram_blocks, MENDED, guest.machine)
    byte_order = core.byte_order
    guest_note, remarks = _kernel_note(guest, memory, request, byte_order, advance)
    text = vmcoreinfo_text(guest_note, byte_order)
    mappings = None
    if request.paging:
        mappings, remark = _map_memory(guest, memory, request, text)
        remarks += remark
    return (
        GuestSnapshot(
            architecture=guest.architecture,
            ram_blocks=guest.ram_blocks,
            vcpus=guest.vcpus,
            guest_note=guest_note,
            utsname=read_utsname(memory, guest.architecture, guest.ram_blocks, text),
            mappings=mappings,
            machine=guest.machine,
        ),
        remarks,
    )
