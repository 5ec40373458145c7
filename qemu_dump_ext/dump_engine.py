"""The one use case: take a dump of a guest. Every door calls `dump`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from qemu_dump_ext.dialect import MENDED, qemu_dialect
from qemu_dump_ext.dump_formats import all_dump_formats
from qemu_dump_ext.dump_plan import GuestSnapshot, make_plan, select_blocks
from qemu_dump_ext.dump_request import DumpRequest
from qemu_dump_ext.dump_sink import Sink
from qemu_dump_ext.errors import EXIT_INCOMPLETE, EXIT_SUCCESS
from qemu_dump_ext.guest import GuestMemory
from qemu_dump_ext.guest_probe import (
    GuestAccess,
    ProbedGuest,
    find_guest_note,
    probe_guest,
    read_utsname,
)
from qemu_dump_ext.guest_tables import TableReader, collect_mappings
from qemu_dump_ext.memory_sources import open_memory
from qemu_dump_ext.memory_sources._declaration import SourceContext
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.run_state import stopped
from qemu_dump_ext.vmcoreinfo import vmcoreinfo_text


@dataclass(frozen=True)
class DumpReport:
    """What was done.

    Attributes:
        target: As the user named it.
        format: `elf`, `kdump-zlib`, `kdump-raw-zlib`, ...
        memory_size: Guest memory in the dump, in bytes.
        bytes_written: Size of what was written.
        seconds: From the first question to the last byte.
        stopped_seconds: How long the guest was kept stopped.
        memory_source: Where guest memory came from.
        passed_over: Faster memory sources, and why each was not taken.
        missing: Registers that no source gave, by note and cpu_index; zero in the dump.
        remarks: What else the user should know.
    """

    target: str
    format: str
    memory_size: int
    bytes_written: int
    seconds: float
    stopped_seconds: float
    memory_source: str
    passed_over: Sequence[tuple[str, str]]
    missing: Mapping[tuple[str, int], Sequence[str]]
    remarks: Sequence[str]

    @property
    def exit_status(self) -> int:
        """EXIT_SUCCESS, or EXIT_INCOMPLETE where something had to be left out."""
        return EXIT_INCOMPLETE if self.missing else EXIT_SUCCESS

    def lines(self) -> list[str]:
        """Say it in words."""
        mib = 1 << 20
        rate = self.memory_size / mib / max(self.seconds, 1e-6)
        summary = (
            f"{self.target}: {self.format}, {self.memory_size / mib:.1f} MiB of guest memory in"
            f" {self.bytes_written / mib:.1f} MiB, {self.seconds:.1f} s ({rate:.0f} MiB/s,"
            f" memory by {self.memory_source}), guest stopped for {self.stopped_seconds:.1f} s"
        )
        lines = [summary]
        lines += [f"{name} was not used: {reason}" for name, reason in self.passed_over]
        lines += self.remarks
        lines += [
            f"incomplete: vCPU {index} has zero for {', '.join(names)} in its note {note}:"
            " no source gives them"
            for (note, index), names in self.missing.items()
        ]
        return lines

    def to_json(self) -> str:
        """Say it to a machine: one line; keys are the attributes, and `exit_status`."""
        fields = asdict(self)
        fields["missing"] = [
            {"note": note, "vcpu": index, "registers": list(names)}
            for (note, index), names in self.missing.items()
        ]
        return json.dumps(fields | {"exit_status": self.exit_status})


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
        SourceError: The guest cannot be reached, or was lost.
        DumpWriteError: The dump cannot be written.
    """
    dump_format = all_dump_formats()["elf" if request.codec is None else "kdump"]
    started = time.monotonic()
    with stopped(access.monitor):
        stopped_at = time.monotonic()
        guest = probe_guest(access)
        dialect = qemu_dialect(guest.version) if request.exact else MENDED
        select_blocks(guest.ram_blocks, dialect, request, guest.architecture.page_size)
        context = SourceContext(access.monitor, access.stub, guest.ram_blocks)
        with open_memory(memory, context) as opened:
            snapshot, remarks = _complete(guest, opened.memory, request)
            plan = make_plan(snapshot, dialect, request)
            progress.start(plan.memory_size)
            dump_format.write(request, plan, opened.memory, sink, progress.advance)
    ended = time.monotonic()
    return DumpReport(
        target=sink.name,
        format=request.format_name,
        memory_size=plan.memory_size,
        bytes_written=sink.bytes_written,
        seconds=ended - started,
        stopped_seconds=ended - stopped_at,
        memory_source=opened.memory.name,
        passed_over=opened.passed_over,
        missing=plan.missing,
        remarks=(*remarks, *plan.remarks),
    )


def _complete(
    guest: ProbedGuest, memory: GuestMemory, request: DumpRequest
) -> tuple[GuestSnapshot, list[str]]:
    """Add what only guest memory tells: the kernel's note where QEMU's is out of reach, uname."""
    remarks = []
    byte_order = guest.architecture.cores[0].byte_order
    guest_note = guest.guest_note
    if guest_note is None:
        guest_note = find_guest_note(memory, guest.ram_blocks, byte_order)
        where = "found in guest memory" if guest_note else "not found in guest memory"
        remarks.append(f"VMCOREINFO was {where}; QEMU's own: {guest.native_refusal}")
    text = vmcoreinfo_text(guest_note, byte_order)
    mappings = None
    if request.paging:
        mappings = collect_mappings(
            guest.architecture,
            guest.vcpus,
            TableReader(memory, guest.ram_blocks),
            guest.readable_ranges
            if request.exact
            else [(block.gpa, block.end) for block in guest.ram_blocks],
            native=request.exact,
        )
        if mappings is None:
            remarks.append("no vCPU uses paging that we know: virtual addresses are physical ones")
    return (
        GuestSnapshot(
            architecture=guest.architecture,
            ram_blocks=guest.ram_blocks,
            vcpus=guest.vcpus,
            guest_note=guest_note,
            utsname=read_utsname(memory, guest.architecture, guest.ram_blocks, text),
            mappings=mappings,
        ),
        remarks,
    )
