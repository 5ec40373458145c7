"""The one use case: take a dump of a guest. Every door calls `dump`."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from qemu_dump_ext.architectures import Translation
from qemu_dump_ext.dump_formats import ProgressCallback, WriteDump, find_dump_format
from qemu_dump_ext.engine.guest_view import GuestView, Vmcoreinfo
from qemu_dump_ext.engine.opening import Kernel
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.engine.stopped_guest import StoppedGuest, stopped_guest
from qemu_dump_ext.errors import (
    DumpTooLargeError,
    MissingPackageError,
    NotDumpedByQemuError,
    NotLiveError,
    RequestError,
    SourceError,
)
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest.memory import ForetoldMemory, GuestMemory
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.pages.page_set import PageSet
from qemu_dump_ext.pages.zero_pages import numpy_or_none
from qemu_dump_ext.paging.segments import Segment
from qemu_dump_ext.paging.tables import (
    TableReader,
    collect_mappings,
    kernel_translations,
    roots_of_vcpus,
)
from qemu_dump_ext.plan.plan import DumpPlan, GuestSnapshot, make_plan, select_blocks
from qemu_dump_ext.plan.request import DUMP_LEVEL_MAX, ZERO, DumpRequest, Live
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.monitor_queries import read_memory_size
from qemu_dump_ext.qemu.probe import ProbedGuest
from qemu_dump_ext.qemu.run_state import PauseLimit
from qemu_dump_ext.sinks import Sink, all_sinks
from qemu_dump_ext.structures.dialect import Dialect, qemu_dialect
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_text, vmcoreinfo_value
from qemu_dump_ext.value import Value

if TYPE_CHECKING:
    from qemu_dump_ext.pages.copied_memory import CopiedMemory

_TAKES_LESS = {
    None: f"level {DUMP_LEVEL_MAX} and --mini take less",
    "usual": "--mini=smallest takes less",
    "smallest": None,
}

_LEFT_AT_MOST = 16
"""No more than this part of a guest is expected in a dump of the highest level."""


def dump(
    request: DumpRequest,
    access: GuestAccess,
    sink: Sink,
    *,
    memory: str,
    progress: ProgressMeter,
    mend_refused: bool = False,
) -> DumpReport:
    """Take a dump of a guest.

    The guest is stopped while its memory is read and, if it ran before, runs again afterwards,
    whatever happens. `sink` holds a complete dump when this returns; making it final is up to
    the caller, who also removes it after an error.

    Args:
        request: What to write.
        access: The ways to the guest.
        sink: Where to write.
        memory: Name of the memory source, or `auto`.
        progress: Is told of every piece of guest memory.
        mend_refused: Where QEMU itself refuses the target, no dump can be exact: take one that is
            not.

    Raises:
        RequestError: The request is impossible.
        NotDumpedByQemuError: It is to be exact, and QEMU refuses the target; nothing was written.
        SourceError: The guest cannot be reached, or was lost.
        DumpWriteError: The dump cannot be written.
    """
    _check(request, sink)
    if access.silent is not None and (request.exact or request.live is Live.REQUIRE):
        asked = "--exact" if request.exact else "--live"
        raise SourceError(f"{asked} needs QEMU: {access.silent.reason}")
    prepare(request)
    started = time.monotonic()
    with _writing(request, access) as write:
        output = _Output(write, sink, progress, started)
        return _dump(request, access, output, memory, mend_refused=mend_refused)


def _writing(request: DumpRequest, access: GuestAccess) -> AbstractContextManager[WriteDump]:
    """Start, while the guest still runs, what writes a dump of it.

    Processes that pack come up while the rest is imported and QEMU is asked. How many pages will be
    in the dump is known only when none is started any more.
    """
    dump_format = find_dump_format(request.format)
    if dump_format.start is None or access.silent is not None:
        return nullcontext(dump_format.write)
    size = read_memory_size(access.lasting) or 0
    if request.memory_range is not None:
        size = min(size, request.memory_range.length)
    if request.level_of_pages == DUMP_LEVEL_MAX:
        size //= _LEFT_AT_MOST
    return dump_format.start(request, size)


def _dump(
    request: DumpRequest, access: GuestAccess, output: _Output, memory: str, *, mend_refused: bool
) -> DumpReport:
    fallback: list[str] = []
    if request.live is not None and access.silent is None:
        try:
            return _dump_live(request, access, output, mend_refused=mend_refused)
        except NotLiveError as error:
            if request.live is Live.REQUIRE and not error.stands_still:
                raise
            fallback.append(f"not live, but as with --snapshot: {error}")
            request = replace(request, live=None, snapshot=True)
    with ExitStack() as copies:
        with stopped_guest(access, memory, _pause_limit(request)) as guest:
            job = _Dump(request, guest, output)
            job.remarks += fallback
            job.plan(mend_refused=mend_refused)
            if request.snapshot:
                job.copy(copies)
            else:
                job.write_from_guest()
            guest.check_undisturbed()
            stopped_by_us = guest.pause.is_ours
        stopped_seconds = guest.pause.seconds()
        if request.snapshot:
            job.write_copy()
        return replace(job.report(stopped_seconds), stopped_by_us=stopped_by_us)


def _dump_live(
    request: DumpRequest, access: GuestAccess, output: _Output, *, mend_refused: bool
) -> DumpReport:
    from qemu_dump_ext.engine.live_guest import live_guest  # noqa: PLC0415 - see `prepare`

    limit = _pause_limit(request)
    with live_guest(
        access,
        output.sink.directory,
        advance=lambda _size: output.progress.advance(0),
        limit=limit,
        gently=request.live is Live.PREFER,
    ) as guest:
        job = _Dump(request, guest, output)
        job.plan(mend_refused=mend_refused)
        job.write_from_guest()
        return job.report(guest.pause.seconds())


def dump_stopped(
    request: DumpRequest, guest: StoppedGuest, sink: Sink, *, progress: ProgressMeter
) -> DumpReport:
    """Take a dump of a guest that stands still before and afterwards; otherwise as `dump`."""
    if request.snapshot or request.live is not None:
        raise RequestError("a guest that stays stopped needs no snapshot")
    _check(request, sink)
    prepare(request)
    job = _Dump(request, guest, _unprepared(request, sink, progress))
    job.plan()
    job.write_from_guest()
    guest.check_undisturbed()
    return job.report(guest.pause.seconds())


def dump_stored(
    request: DumpRequest, guest: GuestView, sink: Sink, *, progress: ProgressMeter
) -> DumpReport:
    """Write a dump of a guest that is in another dump; errors as those of `dump`."""
    _check(request, sink)
    find_dump_format(request.format).require(request)
    job = _Dump(request, guest, _unprepared(request, sink, progress))
    job.plan()
    job.write_from_guest()
    return job.report(guest.pause.seconds())


def prepare(request: DumpRequest) -> None:
    """Import, while the guest still runs, what a dump of it uses.

    Importing takes longer than all that is done to a small guest while it stands still.

    Raises:
        CodecUnavailableError: A package cannot be imported.
        RequestError: There is no such format, or its codec has no such level.
    """
    dump_format = find_dump_format(request.format)
    dump_format.require(request)
    tells_pages_apart = bool(request.level_of_pages) or request.max_bytes is not None
    # What few dumps need is imported by these alone.
    wanted = {
        "engine.estimate": request.max_bytes is not None,
        "engine.live_guest": request.live is not None,
        "linux.kernel_pages": tells_pages_apart,
        "pages.copied_memory": request.snapshot or request.live is not None,
        "plan.windows_plan": dump_format.of_windows,
        "windows.describe": dump_format.of_windows,
    }
    for name in (name for name, is_wanted in wanted.items() if is_wanted):
        importlib.import_module(f"qemu_dump_ext.{name}")
    if tells_pages_apart:
        numpy_or_none()
    all_sinks()


def _check(request: DumpRequest, sink: Sink) -> None:
    # What the request and the sink alone make impossible, before the guest is stopped.
    dump_format = find_dump_format(request.format)
    dump_format.check(request)
    dump_format.check_sink(sink)


class _Output(Value):
    # What writes a dump, and where; since when, by the monotonic clock.
    write: WriteDump
    sink: Sink
    progress: ProgressMeter
    started: float


def _unprepared(request: DumpRequest, sink: Sink, progress: ProgressMeter) -> _Output:
    return _Output(find_dump_format(request.format).write, sink, progress, time.monotonic())


class _Dump:
    # One dump, step by step: some while the guest stands still, some afterwards.
    def __init__(self, request: DumpRequest, guest: GuestView, output: _Output) -> None:
        self._request = request
        self._format = find_dump_format(request.format)
        self._guest = guest
        self._output = output
        self._sink = output.sink
        self._progress = output.progress
        self.remarks: list[str] = []
        self._copy: CopiedMemory | None = None

    def plan(self, *, mend_refused: bool = False) -> None:
        guest = self._guest
        if mend_refused and self._request.exact and not _is_dumped_by_qemu(guest.probed):
            self._request = replace(self._request, exact=False)
        request = self._request
        dialect = _native_dialect(guest.probed) if request.exact else guest.dialect
        if self._format.of_windows:
            self._plan = _plan_windows(guest, request, dialect)
        else:
            whole_pages = self._format.whole_pages
            granule = guest.architecture.page_size if whole_pages else 1
            select_blocks(guest.ram_blocks, dialect, request, granule)
            fitted: list[str] = []
            if request.max_bytes is not None and request.mini is None:
                self._request, fitted = _fit(guest, request)
                request = self._request
            snapshot, remarks = _snapshot(guest, request, self._searched)
            self.remarks += [*fitted, *remarks]
            self._plan = make_plan(snapshot, dialect, request, whole_pages=whole_pages)
        self._memory, self._passed_over = guest.memory, guest.passed_over
        _foretell(self._memory, self._plan.ram_blocks)
        self._progress.start(self._plan.memory_size)
        self._check_pause(0)

    def copy(self, copies: ExitStack) -> None:
        from qemu_dump_ext.pages.copied_memory import room_for_copy  # noqa: PLC0415 - see `prepare`

        memory, blocks = self._guest.memory, self._plan.ram_blocks
        room = room_for_copy(memory, blocks, self._sink.directory)
        self._copy = copies.enter_context(room)
        self._copy.take(memory, blocks, self._check_pause)

    def write_from_guest(self) -> None:
        def advance(size: int) -> None:
            self._check_pause(size)
            self._advance(size)

        self._write(self._guest.memory, advance)

    def write_copy(self) -> None:
        copy = self._copy
        if copy is not None:
            self.remarks.append(f"{copy.size >> 20} MiB of guest memory were copied {copy.where}")
            self._progress.start(self._plan.memory_size)
            self._write(copy, self._advance)

    def _advance(self, size: int) -> None:
        most = self._request.max_bytes
        if most is not None and self._sink.bytes_written > most:
            raise DumpTooLargeError(
                f"given up: the dump takes more than {most} bytes",
                hint=_TAKES_LESS[self._request.mini],
            )
        self._progress.advance(size)

    def _write(self, memory: GuestMemory, advance: ProgressCallback) -> None:
        self._output.write(self._request, self._plan, memory, self._sink, advance)

    def _searched(self, size: int) -> None:
        self._check_pause(size)
        self._progress.search("VMCOREINFO")

    def _check_pause(self, _size: int) -> None:
        pause, limit = self._guest.pause, _pause_limit(self._request)
        pause.check()
        if limit is not None and pause.seconds() > limit.seconds:
            raise limit.error()

    def report(self, stopped_seconds: float) -> DumpReport:
        guest, exact = self._guest.probed, self._request.exact
        return DumpReport(
            target=self._sink.name,
            format=self._format.name,
            memory_size=self._plan.memory_size,
            bytes_written=self._sink.bytes_written,
            seconds=time.monotonic() - self._output.started,
            stopped_seconds=stopped_seconds,
            memory_source=self._memory.name,
            passed_over=tuple(self._passed_over),
            missing=self._plan.missing,
            remarks=(
                *self._guest.remarks,
                *self.remarks,
                *self._plan.remarks,
                *filter(None, [self._guest.pause.taken_over, self._guest.pause.left]),
            ),
            native_refusal=guest.native_refusal if _is_dumped_by_qemu(guest) else None,
            mended=self._guest.differences(self._plan, self._format.name),
            lacking=tuple(self._guest.lacking),
            doubts=(
                *guest.doubts,
                *self._plan.doubts,
                *(_guesses(guest, self._request) if exact else ()),
            ),
            stood_still=self._guest.stands_still,
            memory_is_slow=self._memory.is_slow,
            architecture=guest.architecture.name,
            zeros_left_out=self._request.omit_zero,
            names_kernel=self._plan.utsname.names_linux,
            kernel=_kernel_in(self._plan),
        )


def _kernel_in(plan: DumpPlan) -> Kernel:
    offset, size = plan.vmcoreinfo_span or (0, 0)
    text = plan.notes[offset : offset + size]
    return Kernel(vmcoreinfo_value(text, "OSRELEASE"), vmcoreinfo_value(text, "BUILD-ID"))


def _foretell(memory: GuestMemory, parts: Sequence[RamBlock]) -> None:
    if isinstance(memory, ForetoldMemory):
        memory.foretell(parts)


def _pause_limit(request: DumpRequest) -> PauseLimit | None:
    if request.max_pause is None:
        return None
    return PauseLimit(
        request.max_pause, None if request.snapshot or request.live else "--snapshot is shorter"
    )


def _is_dumped_by_qemu(guest: ProbedGuest) -> bool:
    since = guest.architecture.dumped_by_qemu_since
    return since is not None and guest.version >= since


def _guesses(guest: ProbedGuest, request: DumpRequest) -> Sequence[str]:
    """Name what QEMU's own notes alone would tell, where they could not be had."""
    guessed = list(guest.guessed)
    if guest.guest_note is None and request.vmcoreinfo:
        guessed.append("VMCOREINFO")
    if guest.native_refusal is None or not guessed:
        return ()
    names = ", ".join(guessed)
    told = f"{names} may be otherwise in QEMU's dump: its own notes could not be had"
    return (f"{told}: {guest.native_refusal}",)


def _native_dialect(guest: ProbedGuest) -> Dialect:
    dialect = qemu_dialect(guest.version)
    if not _is_dumped_by_qemu(guest):
        raise NotDumpedByQemuError(
            f"--exact: {dialect.name} itself does not dump {guest.architecture.name} guests",
            hint="without --exact, they are dumped as their Linux does it",
        )
    return dialect


def _plan_windows(guest: GuestView, request: DumpRequest, dialect: Dialect) -> DumpPlan:
    """Decide what goes into a Windows dump."""
    from qemu_dump_ext.plan.windows_plan import make_windows_plan  # noqa: PLC0415 - see `prepare`

    note = guest.windows_note
    if note is None and request.exact:
        raise SourceError(f"the note of the vmcoreinfo device: {guest.probed.native_refusal}")
    windows = guest.describe_windows(note if request.vmcoreinfo else b"", dialect)
    return make_windows_plan(
        guest.core,
        guest.ram_blocks,
        guest.covered_blocks,
        windows,
        dialect=dialect,
        request=request,
    )


def _snapshot(
    guest: GuestView, request: DumpRequest, advance: Callable[[int], None]
) -> tuple[GuestSnapshot, list[str]]:
    """Return what a dump is planned from, and remarks."""
    vmcoreinfo, remarks = _vmcoreinfo(guest, request, advance)
    excluded = None
    if request.level_of_pages:
        excluded, more = _excluded_pages(guest, request, vmcoreinfo)
        remarks += more
    mappings = None
    if request.paging:
        mappings, more = _map_memory(guest, request, vmcoreinfo.text)
        remarks += more
    snapshot = GuestSnapshot(
        architecture=guest.architecture,
        ram_blocks=guest.ram_blocks,
        vcpus=guest.vcpus,
        guest_note=vmcoreinfo.note,
        utsname=guest.read_utsname(vmcoreinfo),
        mappings=mappings,
        machine=guest.probed.machine,
        excluded=excluded,
    )
    return guest.complete(snapshot), remarks


def _fit(guest: GuestView, request: DumpRequest) -> tuple[DumpRequest, list[str]]:
    """Return the request at the level at which the dump fits, and remarks."""
    from qemu_dump_ext.engine.estimate import level_that_fits  # noqa: PLC0415 - see `prepare`

    try:
        found = level_that_fits(guest, guest.find_vmcoreinfo(request.kernel), request)
    except (SourceError, MissingPackageError) as error:
        if request.dump_level_required:
            raise
        return request, [f"the size of the dump could not be told before: {error}"]
    told = f"{found.words} was taken: a dump of about {found.file_bytes >> 20} MiB"
    return replace(request, dump_level=found.level), [told]


def _excluded_pages(
    guest: GuestView, request: DumpRequest, vmcoreinfo: Vmcoreinfo
) -> tuple[PageSet | None, list[str]]:
    """Return what a dump level leaves out; None, with the reason, where that cannot be told."""
    from qemu_dump_ext.linux.page_filter import FilterRules  # noqa: PLC0415 - see `prepare`

    rules = FilterRules(
        request.level_of_pages,
        request.exact,
        without_struct_pages=request.mini is not None,
        without_text=request.mini == "smallest",
    )
    try:
        if not vmcoreinfo.text:  # as --exact or --no-vmcoreinfo will have it in the dump
            vmcoreinfo = guest.find_vmcoreinfo(request.kernel)
        _foretell(guest.memory, ())  # struct pages are here and there
        pages = guest.kernel_pages(vmcoreinfo)
        return pages.excluded(rules), list(pages.remarks)
    except (SourceError, MissingPackageError, RequestError) as error:
        if rules.level == ZERO:  # no pages need to be told apart for it
            return None, []
        if request.dump_level_required:
            raise
        return None, [f"dump level {rules.level}: {error}: no page was left out"]


def _vmcoreinfo(
    guest: GuestView, request: DumpRequest, advance: Callable[[int], None]
) -> tuple[Vmcoreinfo, list[str]]:
    """Return the note that the dump shall have behind those of the vCPUs, and remarks."""
    known = guest.probed.guest_note
    if not request.vmcoreinfo:
        return Vmcoreinfo(), []
    if request.exact and request.kernel is None and known is not None:
        # No note is what QEMU would have.
        return Vmcoreinfo(known, vmcoreinfo_text(known, guest.core.byte_order)), []
    # A range is little; page tables, where they are asked for, begin at what VMCOREINFO tells.
    everywhere = request.memory_range is None or request.kernel is not None or request.paging
    found = guest.find_vmcoreinfo(request.kernel, advance, everywhere=everywhere)
    remarks = list(found.remarks)
    if known is None:
        remarks.append(f"QEMU's own VMCOREINFO: {guest.probed.native_refusal}")
    return found, remarks


def _map_memory(
    guest: GuestView, request: DumpRequest, vmcoreinfo: bytes
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
        ranges = list(guest.probed.readable_ranges)
    reader = TableReader(guest.memory, guest.ram_blocks)
    return collect_mappings(roots, reader, ranges, native=native), remarks
