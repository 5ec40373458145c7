"""Ask a stopped guest what it is: version, architecture, RAM blocks, registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from qemu_dump_ext.architectures import all_architectures, architecture_for_cpu_types
from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Register,
    TargetClues,
    VcpuReadings,
)
from qemu_dump_ext.dialect import QemuVersion
from qemu_dump_ext.errors import GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest.model import DescriptorMonitor, GuestMemory, Monitor, RamBlock, Stub, Vcpu
from qemu_dump_ext.guest_tables import TableReader, kernel_translations
from qemu_dump_ext.memory_sources._declaration import SourceContext
from qemu_dump_ext.monitor_queries import (
    find_machine_objects,
    has_device,
    read_byte_order,
    read_property,
    read_register_texts,
)
from qemu_dump_ext.monitor_text import (
    RUNNING,
    parse_flat_view,
    parse_named_values,
    parse_readable_ranges,
    parse_status,
    parse_version,
)
from qemu_dump_ext.native_notes import NativeNotes, parse_native_notes
from qemu_dump_ext.page_table_walk import translate_by
from qemu_dump_ext.stub_registers import read_g_packet, read_stub_registers
from qemu_dump_ext.vmcoreinfo import (
    UTSNAME_TOTAL_SIZE,
    UtsName,
    parse_new_utsname,
    vmcoreinfo_number,
    vmcoreinfo_value,
)

_ONE_NAME_FOR_BOTH_BYTE_ORDERS: QemuVersion = (10, 0, 0)
"""From here on QMP's query-target may answer `sh4` for sh4eb, and `xtensa` for xtensaeb."""


@dataclass(frozen=True)
class GuestAccess:
    """The ways to a guest that a door has.

    Attributes:
        monitor: QEMU's human monitor.
        stub: The gdbstub, or None.
        native_dump: Lets QEMU dump one byte at a gpa and returns the ELF file; raises
            SourceError where that is not possible.
        addresses: Of QEMU's sockets to which this process is connected: a path or HOST:PORT.
        target_name: Returns QEMU's name of the target, such as `mipsel`, or None where it does
            not tell; None where the door cannot ask.
        qmp: QEMU's QMP, or None.
    """

    monitor: Monitor
    stub: Stub | None
    native_dump: Callable[[int], bytes]
    addresses: Sequence[str] = ()
    target_name: Callable[[], str | None] | None = None
    qmp: DescriptorMonitor | None = None

    def source_context(self, ram_blocks: Sequence[RamBlock]) -> SourceContext:
        """Return what memory sources may use to get at `ram_blocks`."""
        return SourceContext(self.monitor, self.stub, ram_blocks, self.addresses, self.qmp)


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
        machine: QOM type of the machine.
        shown_first: Registers of each vCPU by cpu_index, as the monitor showed them at first.
    """

    version: QemuVersion
    architecture: Architecture
    ram_blocks: Sequence[RamBlock]
    readable_ranges: Sequence[tuple[int, int]]
    vcpus: Sequence[Vcpu]
    guest_note: bytes | None
    native_refusal: str | None
    machine: str = ""
    shown_first: Mapping[int, Mapping[str, int]] = field(default_factory=dict)


def probe_guest(access: GuestAccess) -> ProbedGuest:
    """Find out what would be dumped; the guest must be stopped.

    Raises:
        SourceError: The monitor or the stub does not answer.
        UnsupportedTargetError: No architecture file describes the guest.
    """
    monitor = access.monitor
    version = parse_version(monitor.execute("info version"))
    objects = find_machine_objects(
        monitor, tuple(known.cpu_type_suffix for known in all_architectures().values())
    )
    flat_views = monitor.execute("info mtree -f")
    ram_blocks = parse_flat_view(flat_views)
    texts = read_register_texts(monitor)
    vcpu_property = partial(read_property, monitor, objects.cpu_path)
    clues = TargetClues(
        texts[min(texts)],
        vcpu_property,
        _target_name(access, version),
        lambda: read_byte_order(monitor, [block.gpa for block in ram_blocks]),
        lambda: read_g_packet(access.stub, min(texts)) if access.stub else b"",
    )
    architecture = architecture_for_cpu_types({objects.cpu_type}, clues)
    native, refusal = NativeNotes((), b""), None
    try:
        if ram_blocks:
            content = access.native_dump(ram_blocks[0].gpa)
            native = parse_native_notes(content, architecture, len(texts))
    except SourceError as error:
        refusal = str(error)
    hardware_segments = "enabled" in monitor.execute("info kvm")
    by_stub = _read_stub(architecture, access.stub) if access.stub else {}
    properties = {
        register.name: number
        for register in architecture.registers
        if register.qom and (number := _number(vcpu_property(register.qom))) is not None
    }
    by_monitor = _parse_monitor_registers(architecture, texts)
    by_note = dict(zip(sorted(texts), native.vcpus, strict=False))
    vcpus = tuple(
        Vcpu(
            index,
            merge_readings(
                architecture,
                VcpuReadings(
                    gdb=by_stub.get(index, {}),
                    monitor=by_monitor[index],
                    native=by_note.get(index, {}),
                    hardware_segments=hardware_segments,
                    native_byte_order=native.byte_order,
                    qom=properties,
                ),
            ),
        )
        for index in sorted(texts)
    )
    unknown_note = refusal is not None and has_device(monitor, "vmcoreinfo")
    return ProbedGuest(
        version,
        architecture,
        ram_blocks,
        parse_readable_ranges(flat_views),
        vcpus,
        guest_note=None if unknown_note else native.guest_note,
        native_refusal=refusal,
        machine=objects.machine_type,
        shown_first=by_monitor,
    )


def check_undisturbed(monitor: Monitor, guest: ProbedGuest) -> None:
    """Notice when somebody else let the guest run, or reset it, since it was probed.

    Only registers of notes are compared: others go on counting while the guest is stopped.

    Raises:
        SourceError: It runs, or a register changed: what was read does not fit together.
    """
    running = parse_status(monitor.execute("info status")) == RUNNING
    texts = read_register_texts(monitor)
    if running or _parse_monitor_registers(guest.architecture, texts) != guest.shown_first:
        raise SourceError(
            "somebody else let the guest run, or reset it, while it was dumped",
            hint="dump it again, and keep other clients of QEMU from it meanwhile",
        )


def _target_name(access: GuestAccess, version: QemuVersion) -> Callable[[], str | None]:
    if access.target_name is None or version >= _ONE_NAME_FOR_BOTH_BYTE_ORDERS:
        return lambda: None
    return access.target_name


def merge_readings(architecture: Architecture, readings: VcpuReadings) -> Mapping[str, int]:
    """Merge what the sources say: the stub before the monitor before QEMU's own notes."""
    if architecture.reconcile is not None:
        return architecture.reconcile(readings)
    return {**readings.native, **readings.monitor, **readings.gdb}


def _read_stub(architecture: Architecture, stub: Stub) -> dict[int, dict[str, int]]:
    """Return the stub's registers by cpu_index and our names."""
    names = {register.gdb for register in architecture.registers if register.gdb}
    vcpus: dict[int, dict[str, int]] = {}
    for vcpu in read_stub_registers(stub, names, architecture.g_packet):
        sent = vcpu.registers
        if architecture.correct_stub is not None:
            sent = architecture.correct_stub(sent)
        order = architecture.cores[0].byte_order
        if architecture.stub_byte_order is not None:
            order = architecture.stub_byte_order(sent)
        vcpus[vcpu.index] = {
            register.name: int.from_bytes(sent[register.gdb], order)
            for register in architecture.registers
            if register.gdb is not None and register.gdb in sent
        }
    return vcpus


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _parse_monitor_registers(
    architecture: Architecture, texts: Mapping[int, str]
) -> dict[int, dict[str, int]]:
    return {index: _parse_registers(architecture, text) for index, text in texts.items()}


def _parse_registers(architecture: Architecture, text: str) -> dict[str, int]:
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
    if address is None:
        return UtsName()
    address += vmcoreinfo_number(vmcoreinfo, "OFFSET(uts_namespace.name)") or 0
    translations = kernel_translations(architecture, vmcoreinfo, ram_blocks)
    found = translate_by(translations, TableReader(memory, ram_blocks), address)
    if found is None:
        return UtsName()
    gpa = found[0]
    if not any(b.gpa <= gpa and gpa + UTSNAME_TOTAL_SIZE <= b.end for b in ram_blocks):
        return UtsName()
    buffer = bytearray(UTSNAME_TOTAL_SIZE)
    try:
        memory.read_into(gpa, memoryview(buffer))
    except GuestMemoryFaultError:
        return UtsName()
    name = parse_new_utsname(bytes(buffer))
    if name is None or name.release != vmcoreinfo_value(vmcoreinfo, "OSRELEASE"):
        return UtsName()
    return name
