"""Decide what goes into a dump. Pure: no I/O, everything that can be refused is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qemu_dump_ext.architectures import Architecture, Core, phys_base
from qemu_dump_ext.errors import NotDumpedByQemuError, RequestError
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.pages.page_set import PageSet
from qemu_dump_ext.paging.segments import (
    Segment,
    identity_segments,
    merge_within_blocks,
    overlap_size,
    unmapped_size,
)
from qemu_dump_ext.plan.ranges import blocks_within, filter_native
from qemu_dump_ext.plan.request import ZERO, DumpRequest
from qemu_dump_ext.registers.notes import KERNEL_GS_BASE, EncodedNotes, encode_vcpu_notes
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.elf_notes import whole_notes
from qemu_dump_ext.structures.utsname import UtsName
from qemu_dump_ext.structures.vmcoreinfo import (
    PAGE_SIZES,
    VMCOREINFO_NOTE_NAME,
    vmcoreinfo_number,
    vmcoreinfo_value,
)
from qemu_dump_ext.value import Value

if TYPE_CHECKING:
    from qemu_dump_ext.structures.win_dmp import WindowsDump


class EarlierDump(Value):
    """What an earlier dump of the guest says, of which a dump is made.

    Attributes:
        core: Form of the dump that is to be made of it.
        vcpu_notes: Notes that say of the vCPUs what registers do not; None: registers say it all.
        vcpu_count: Number of vCPUs.
        other_notes: Notes of neither vCPUs nor the kernel.
        absent: Bytes that the guest had and the earlier dump has not, as a set of pages of one
            byte; what touches them is left out.
        dump_level: Which pages it has left out.
        phys_base: As it says it; None: it does not.
        page_size: As it says it; None: it does not.
        segments: The PT_LOADs of a core that is to be kept as it is; None: others are made.
        kept: What it says of the kernel counts, be it right or not.
    """

    core: Core
    vcpu_notes: bytes | None
    vcpu_count: int
    other_notes: bytes
    absent: PageSet
    dump_level: int = 0
    phys_base: int | None = None
    page_size: int | None = None
    segments: Sequence[Segment] | None = None
    kept: bool = False


class GuestSnapshot(Value):
    """What the guest is, valid while it is stopped.

    Attributes:
        architecture: Of the guest.
        ram_blocks: By ascending gpa, not overlapping.
        vcpus: In QEMU's order.
        guest_note: The note that the guest gave to QEMU's vmcoreinfo device, header included, or
            one that was found in its memory; empty where there is none.
        utsname: What is known of the kernel; empty strings where unknown.
        machine: QOM type of the machine.
        mappings: What the page tables map, as `collect_mappings` returns it; None where paging
            was not asked for, or no vCPU uses it.
        excluded: Pages that stay out of the dump; None: none was looked for.
        earlier: The dump that all this comes from; None: it comes from the guest itself.
    """

    architecture: Architecture
    ram_blocks: Sequence[RamBlock]
    vcpus: Sequence[Vcpu]
    guest_note: bytes
    utsname: UtsName
    machine: str = ""
    mappings: Sequence[Segment] | None = None
    excluded: PageSet | None = None
    earlier: EarlierDump | None = None


class DumpPlan(Value):
    """What goes into the dump, whatever its format.

    Attributes:
        core: Form of the headers and of the notes.
        dialect: How it is spelt.
        ram_blocks: What goes in, by ascending gpa.
        covered_blocks: What the dump is about, by ascending gpa: with the pages that are left out.
        dump_level: What is left out, as `DumpRequest` has it; without what could not be told apart.
        segments: The PT_LOADs of an ELF core, in order.
        notes: The notes area, complete.
        vmcoreinfo_span: Offset in `notes` and size of VMCOREINFO's text, in bytes; None: no text.
        vcpu_count: Number of vCPUs.
        page_size: Of kdump blocks, in bytes.
        phys_base: Physical address minus link address of the kernel, modulo 2**64.
        utsname: For the kdump header.
        missing: Registers that no source gave, by note and cpu_index.
        remarks: What the user should know of it.
        pfn_base: The page frame from which those of a kdump are counted.
        doubts: What could not be had, or found out.
        windows: What a Windows dump has besides memory; None where it is none. Its runs of pages
            say in which order memory goes in; of `notes` and `segments` it has none.
    """

    core: Core
    dialect: Dialect
    ram_blocks: tuple[RamBlock, ...]
    segments: tuple[Segment, ...]
    notes: bytes
    vmcoreinfo_span: tuple[int, int] | None
    vcpu_count: int
    page_size: int
    phys_base: int
    utsname: UtsName
    missing: Mapping[tuple[str, int], Sequence[str]]
    covered_blocks: tuple[RamBlock, ...]
    dump_level: int = 0
    remarks: tuple[str, ...] = ()
    pfn_base: int = 0
    doubts: tuple[str, ...] = ()
    windows: WindowsDump | None = None

    @property
    def memory_size(self) -> int:
        """Bytes of guest memory in the dump."""
        return sum(block.size for block in self.ram_blocks)


def make_plan(
    snapshot: GuestSnapshot,
    dialect: Dialect,
    request: DumpRequest | None = None,
    *,
    whole_pages: bool = False,
) -> DumpPlan:
    """Turn a guest into the contents of a dump.

    Args:
        snapshot: The guest.
        dialect: How the dump is spelt.
        request: What was asked for; None: everything, as an ELF core.
        whole_pages: The format stores whole pages only.

    Raises:
        RequestError: The guest has no vCPU or no memory, or none in the range asked for.
    """
    request = request or DumpRequest()
    architecture = snapshot.architecture
    earlier = snapshot.earlier
    if not snapshot.ram_blocks or not (snapshot.vcpus or earlier):
        raise RequestError(
            "dump: no guest memory to dump",
            hint="QEMU dumps the address space of the machine, which has no RAM or no vCPU here",
        )
    core, encoded, remarks = _vcpu_notes(snapshot, dialect)
    notes = encoded.data + snapshot.guest_note + (earlier.other_notes if earlier else b"")
    span = None
    for note in whole_notes(notes, core.byte_order):
        if note.name == VMCOREINFO_NOTE_NAME:
            span = note.descriptor_offset, len(note.descriptor)
    text = notes[span[0] : sum(span)] if span else b""
    page_size = _page_size(snapshot, dialect, text)
    covered = select_blocks(snapshot.ram_blocks, dialect, request, page_size if whole_pages else 1)
    blocks = covered
    if snapshot.excluded is not None:
        granule = page_size if whole_pages else snapshot.excluded.page_size
        blocks = snapshot.excluded.in_pages_of(granule).cut_from(covered)
    left = sum(block.size for block in blocks)
    if earlier is not None:
        blocks = earlier.absent.touched(page_size if whole_pages else 1).cut_from(blocks)
    if not blocks:
        raise RequestError("all pages of this memory are left out: there is nothing to dump")
    segments = _plan_segments(snapshot, dialect, request, blocks)
    what = "pages of zeros are" if request.omit_zero else "the kernel's code is"
    if request.omit_zero or (request.mini == "smallest" and snapshot.excluded is not None):
        remarks.append(f"{what} not in the dump: crash opens it with --zero_excluded only")
    if snapshot.excluded is not None:
        all_ = sum(block.size for block in covered)
        remarks.append(
            f"{_name_of_level(request)}: {(all_ - left) / (1 << 20):.1f} of"
            f" {all_ / (1 << 20):.1f} MiB of guest memory were left out"
        )
    if request.paging and (unmapped := unmapped_size(segments, blocks)):
        remarks.append(
            f"{unmapped / (1 << 20):.1f} MiB of guest memory are mapped by no page table: they are"
            " in the file, and no segment leads to them"
        )
    if request.paging and not dialect.native_mappings and (overlap := overlap_size(segments)):
        remarks.append(
            f"{overlap / (1 << 20):.1f} MiB of virtual addresses are mapped differently by several"
            " page tables: they have a segment for each, of which readers take one"
        )
    base = _phys_base(snapshot, dialect, text)
    relative = architecture.pfn_from_phys_base and not dialect.pfn_from_zero
    return DumpPlan(
        core=core,
        dialect=dialect,
        ram_blocks=tuple(blocks),
        covered_blocks=tuple(covered),
        dump_level=_level_of(request, snapshot) | (earlier.dump_level if earlier else 0),
        segments=tuple(segments),
        notes=notes,
        vmcoreinfo_span=span,
        vcpu_count=earlier.vcpu_count if earlier else len(snapshot.vcpus),
        page_size=page_size,
        phys_base=base,
        utsname=_utsname(snapshot, core, dialect, text),
        missing=encoded.missing,
        pfn_base=base // page_size if relative else 0,
        remarks=tuple(remarks),
    )


def _name_of_level(request: DumpRequest) -> str:
    return f"dump level {request.dump_level}" if request.mini is None else "mini dump"


def _level_of(request: DumpRequest, snapshot: GuestSnapshot) -> int:
    level = request.level_of_pages
    if snapshot.excluded is None:
        level &= ZERO
    return level | ZERO if request.omit_zero else level


def _vcpu_notes(snapshot: GuestSnapshot, dialect: Dialect) -> tuple[Core, EncodedNotes, list[str]]:
    """Return the form of the dump, the notes of the vCPUs, and remarks."""
    architecture, earlier = snapshot.architecture, snapshot.earlier
    if earlier is not None and earlier.vcpu_notes is not None:
        return earlier.core, EncodedNotes(earlier.vcpu_notes, {}, {}), []
    vcpus: Sequence[Vcpu] = snapshot.vcpus
    core = (
        earlier.core
        if earlier is not None
        else architecture.select_core(vcpus, snapshot.ram_blocks, dialect, snapshot.machine)
    )
    remarks: list[str] = []
    if not dialect.vcpus_as_made:
        vcpus, remarks = _as_the_kernel_counts(architecture, vcpus)
    kernel_gs_base, more = _has_kernel_gs_base(core, dialect, vcpus)
    remarks += more
    encoded = encode_vcpu_notes(architecture, core, vcpus, kernel_gs_base=kernel_gs_base)
    if dialect.notes_of_one_size and len(set(encoded.sizes.values())) > 1:
        raise NotDumpedByQemuError(
            "dump: failed to write elf notes",
            hint=f"{dialect.name} does not dump vCPUs of different kinds; without --exact we do",
        )
    return core, encoded, remarks


def _as_the_kernel_counts(
    architecture: Architecture, vcpus: Sequence[Vcpu]
) -> tuple[Sequence[Vcpu], list[str]]:
    """Return the vCPUs in the order of the kernel's numbers, as readers expect, and remarks."""
    indexes = [vcpu.index for vcpu in vcpus]
    if indexes == sorted(indexes):
        return vcpus, []
    # Plugged in another order. Which number a kernel gives to a CPU depends on its version.
    made = ", ".join(map(str, indexes))
    told = f"vCPUs were plugged in the order {made}"
    if architecture.per_cpu_base is not None:
        bases = {vcpu.index: architecture.per_cpu_base(vcpu.registers) for vcpu in vcpus}
        known = {index: base for index, base in bases.items() if base is not None}
        if len(known) == len(set(known.values())) == len(vcpus):
            ordered = sorted(vcpus, key=lambda vcpu: known[vcpu.index])
            order = ", ".join(str(vcpu.index) for vcpu in ordered)
            return ordered, [f"{told}; the kernel counts them {order}, and so do the notes"]
    return vcpus, [f"{told}, and so are the notes: the kernel may count them otherwise"]


def _has_kernel_gs_base(
    core: Core, dialect: Dialect, vcpus: Sequence[Vcpu]
) -> tuple[bool, list[str]]:
    """Tell whether the note `QEMU` has that register, and return remarks."""
    is_there = any(layout.owner == "QEMU" for layout in core.notes)
    if dialect.kernel_gs_base != "known" or not is_there:
        return dialect.kernel_gs_base != "never", []
    if all(KERNEL_GS_BASE in vcpu.registers for vcpu in vcpus):
        return True, []
    shorter = "the notes named QEMU end before it, as they did until QEMU 3.0"
    return False, [f"{KERNEL_GS_BASE} is not known: {shorter}"]


def _page_size(snapshot: GuestSnapshot, dialect: Dialect, vmcoreinfo: bytes) -> int:
    architecture, earlier = snapshot.architecture, snapshot.earlier
    stored = earlier.page_size if earlier else None
    if stored is not None and earlier is not None and earlier.kept:
        return stored
    if not dialect.fixed_page_size:
        told = vmcoreinfo_number(vmcoreinfo, "PAGESIZE")
        if told in PAGE_SIZES:
            return told
    if stored is not None:
        return stored
    return next(
        (
            size
            for beginning, size in architecture.machine_page_sizes.items()
            if snapshot.machine.startswith(beginning)
        ),
        architecture.page_size,
    )


def _phys_base(snapshot: GuestSnapshot, dialect: Dialect, vmcoreinfo: bytes) -> int:
    architecture, earlier = snapshot.architecture, snapshot.earlier
    stored = earlier.phys_base if earlier else None
    if stored is not None and earlier is not None and earlier.kept:
        return stored
    told = phys_base(architecture, vmcoreinfo, is_hex=dialect.phys_base_is_hex)
    if told is None:
        told = stored
    if told is None:
        told = snapshot.ram_blocks[0].gpa if architecture.phys_base_is_lowest else 0
    return told


def select_blocks(
    blocks: Sequence[RamBlock], dialect: Dialect, request: DumpRequest, granule: int
) -> Sequence[RamBlock]:
    """Return what of the guest's memory goes into the dump.

    Args:
        blocks: The guest's, by ascending gpa.
        dialect: How the dump is spelt.
        request: What was asked for.
        granule: Bytes of which a range gets all that it touches.

    Raises:
        RequestError: Nothing does.
    """
    if request.memory_range is None:
        return blocks
    return blocks_within(blocks, request.memory_range, dialect, granule)


def _plan_segments(
    snapshot: GuestSnapshot, dialect: Dialect, request: DumpRequest, blocks: Sequence[RamBlock]
) -> list[Segment]:
    earlier = snapshot.earlier
    if earlier and earlier.segments and not request.paging and request.memory_range is None:
        return list(earlier.segments)
    if not request.paging:
        return [
            Segment(block.gpa if dialect.vaddr_is_paddr else 0, block.gpa, block.size)
            for block in blocks
        ]
    if snapshot.mappings is None:
        return identity_segments(blocks)
    if not dialect.native_mappings:
        return merge_within_blocks(snapshot.mappings, blocks)
    segments = list(snapshot.mappings)
    if request.memory_range is not None:
        segments = filter_native(segments, request.memory_range)
    if dialect.vaddr_is_paddr:
        segments = [Segment(seg.gva or seg.gpa, seg.gpa, seg.size) for seg in segments]
    return segments


def _utsname(snapshot: GuestSnapshot, core: Core, dialect: Dialect, vmcoreinfo: bytes) -> UtsName:
    if dialect.utsname == "unknown":
        return UtsName(machine="Unknown")
    if dialect.utsname == "target":
        return UtsName(machine=snapshot.architecture.qemu_uname_machine)
    known = snapshot.utsname
    if snapshot.earlier is not None and snapshot.earlier.kept:
        return replace(known, machine=known.machine or core.uname_machine)
    # libkdumpfile takes a header for one of Linux only if none of these is empty.
    return UtsName(
        sysname=known.sysname or "Linux",
        nodename=known.nodename,
        release=known.release or vmcoreinfo_value(vmcoreinfo, "OSRELEASE") or "unknown",
        version=known.version or "unknown",
        machine=known.machine or core.uname_machine,
        domainname=known.domainname,
    )
