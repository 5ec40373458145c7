"""Ask a stopped guest what it is: version, architecture, RAM blocks, registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qemu_dump_ext.architectures import architecture_for_cpu_types
from qemu_dump_ext.architectures._declaration import Architecture, Register, VcpuReadings
from qemu_dump_ext.c_struct import ByteOrder
from qemu_dump_ext.dialect import QemuVersion
from qemu_dump_ext.dump_plan import phys_base
from qemu_dump_ext.errors import GuestMemoryFaultError, MonitorAnswerError, SourceError
from qemu_dump_ext.guest import GuestMemory, Monitor, RamBlock, Stub, Vcpu
from qemu_dump_ext.monitor_text import (
    has_device,
    parse_cpu_types,
    parse_flat_view,
    parse_named_values,
    parse_readable_ranges,
    parse_version,
    split_vcpus,
)
from qemu_dump_ext.native_notes import NativeNotes, parse_native_notes
from qemu_dump_ext.page_pipeline import PIECE_SIZE
from qemu_dump_ext.vmcoreinfo import (
    MAX_VMCOREINFO_SIZE,
    UTSNAME_TOTAL_SIZE,
    UtsName,
    note_at_page_start,
    parse_new_utsname,
    possible_notes,
    vmcoreinfo_number,
    vmcoreinfo_value,
)


@dataclass(frozen=True)
class GuestAccess:
    """The ways to a guest that a door has.

    Attributes:
        monitor: QEMU's human monitor.
        stub: The gdbstub, or None.
        native_dump: Lets QEMU dump one byte at a gpa and returns the ELF file; raises
            SourceError where that is not possible.
    """

    monitor: Monitor
    stub: Stub | None
    native_dump: Callable[[int], bytes]


@dataclass(frozen=True)
class ProbedGuest:
    """What the monitor, the stub and QEMU's own notes say.

    Attributes:
        version: Of QEMU.
        architecture: Of the guest.
        ram_blocks: By ascending gpa.
        readable_ranges: What a page table may map as memory: (first, end), ascending.
        vcpus: By ascending cpu_index.
        guest_note: From the vmcoreinfo device; None where QEMU's own notes could not be had,
            though there is such a device.
        native_refusal: Why QEMU's own notes could not be had, or None.
    """

    version: QemuVersion
    architecture: Architecture
    ram_blocks: Sequence[RamBlock]
    readable_ranges: Sequence[tuple[int, int]]
    vcpus: Sequence[Vcpu]
    guest_note: bytes | None
    native_refusal: str | None


def probe_guest(access: GuestAccess) -> ProbedGuest:
    """Find out what would be dumped; the guest must be stopped.

    Raises:
        SourceError: The monitor or the stub does not answer.
        UnsupportedTargetError: No architecture file describes the guest.
    """
    monitor = access.monitor
    version = parse_version(monitor.execute("info version"))
    object_tree = monitor.execute("info qom-tree")
    architecture = architecture_for_cpu_types(parse_cpu_types(object_tree))
    flat_views = monitor.execute("info mtree -f")
    ram_blocks = parse_flat_view(flat_views)
    register_text = monitor.execute("info registers -a")
    texts = split_vcpus(register_text)
    if not texts:
        raise MonitorAnswerError("info registers -a", register_text)
    native, refusal = NativeNotes((), b""), None
    try:
        if ram_blocks:
            content = access.native_dump(ram_blocks[0].gpa)
            native = parse_native_notes(content, architecture, len(texts))
    except SourceError as error:
        refusal = str(error)
    hardware_segments = "enabled" in monitor.execute("info kvm")
    stub_names = {register.gdb for register in architecture.registers if register.gdb}
    stub_vcpus = access.stub.registers(stub_names) if access.stub else ()
    by_stub = {vcpu.index: vcpu.registers for vcpu in stub_vcpus}
    by_note = dict(zip(sorted(texts), native.vcpus, strict=False))
    vcpus = tuple(
        Vcpu(
            index,
            merge_readings(
                architecture,
                VcpuReadings(
                    gdb=_by_our_names(architecture, by_stub.get(index, {})),
                    monitor=_parse_monitor_registers(architecture, texts[index]),
                    native=by_note.get(index, {}),
                    hardware_segments=hardware_segments,
                ),
            ),
        )
        for index in sorted(texts)
    )
    unknown_note = refusal is not None and has_device(object_tree, "vmcoreinfo")
    return ProbedGuest(
        version,
        architecture,
        ram_blocks,
        parse_readable_ranges(flat_views),
        vcpus,
        guest_note=None if unknown_note else native.guest_note,
        native_refusal=refusal,
    )


def merge_readings(architecture: Architecture, readings: VcpuReadings) -> Mapping[str, int]:
    """Merge what the sources say: the stub before the monitor before QEMU's own notes."""
    if architecture.reconcile is not None:
        return architecture.reconcile(readings)
    return {**readings.native, **readings.monitor, **readings.gdb}


def _by_our_names(architecture: Architecture, values: Mapping[str, int]) -> dict[str, int]:
    return {
        register.name: values[register.gdb]
        for register in architecture.registers
        if register.gdb is not None and register.gdb in values
    }


def _parse_monitor_registers(architecture: Architecture, text: str) -> dict[str, int]:
    named = parse_named_values(text)
    values = {
        register.name: named[name]
        for register in architecture.registers
        if (name := _first_known(register, named)) is not None
    }
    if architecture.parse_monitor is not None:
        values |= architecture.parse_monitor(text)
    return values


def _first_known(register: Register, named: Mapping[str, int]) -> str | None:
    return next((name for name in register.monitor if name in named), None)


def read_utsname(
    memory: GuestMemory,
    architecture: Architecture,
    ram_blocks: Sequence[RamBlock],
    vmcoreinfo: bytes,
) -> UtsName:
    """Read the kernel's init_uts_ns, whose address VMCOREINFO tells.

    Returns:
        Empty strings where it is not found, or does not say what VMCOREINFO says.
    """
    address = vmcoreinfo_number(vmcoreinfo, "SYMBOL(init_uts_ns)", 16)
    base = phys_base(architecture, vmcoreinfo)
    if address is None or base is None or architecture.kernel_map_base is None:
        return UtsName()
    offset = vmcoreinfo_number(vmcoreinfo, "OFFSET(uts_namespace.name)") or 0
    gpa = (address + offset - architecture.kernel_map_base + base) & (1 << 64) - 1
    if not any(b.gpa <= gpa and gpa + UTSNAME_TOTAL_SIZE <= b.end for b in ram_blocks):
        return UtsName()
    buffer = bytearray(UTSNAME_TOTAL_SIZE)
    try:
        memory.read_into(gpa, memoryview(buffer))
    except GuestMemoryFaultError:
        return UtsName()
    found = parse_new_utsname(bytes(buffer))
    if found is None or found.release != vmcoreinfo_value(vmcoreinfo, "OSRELEASE"):
        return UtsName()
    return found


def find_guest_note(
    memory: GuestMemory, ram_blocks: Sequence[RamBlock], byte_order: ByteOrder
) -> bytes:
    """Search guest memory for the VMCOREINFO note that the kernel keeps.

    Returns:
        The note of the highest address, header included; empty where there is none.
    """
    found = b""
    buffer = memoryview(bytearray(PIECE_SIZE + 2 * MAX_VMCOREINFO_SIZE))
    for block in ram_blocks:
        for gpa in range(block.gpa, block.end, PIECE_SIZE):
            # Pieces overlap by the longest note.
            view = buffer[: min(len(buffer), block.end - gpa)]
            memory.read_into(gpa, view)
            for offset in possible_notes(view, gpa):
                note = note_at_page_start(view[offset : offset + len(buffer)], byte_order)
                found = note or found
    return found
