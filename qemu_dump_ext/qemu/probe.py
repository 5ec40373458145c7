"""Ask a stopped guest what it is: version, architecture, RAM blocks, registers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, replace
from functools import partial

from qemu_dump_ext.architectures import (
    Architecture,
    TargetClues,
    VcpuReadings,
    architecture_for_cpu_types,
    architectures_of_target,
)
from qemu_dump_ext.errors import GuestDisturbedError, MonitorAnswerError, SourceError
from qemu_dump_ext.guest.access import AskedOnce, GuestAccess, Monitor, Stub
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.qemu.dump_listeners import WHO_LISTENS, why_dumps_are_forbidden
from qemu_dump_ext.qemu.dumped_memory import CONFIDENTIAL, DumpedMemory, find_dumped_memory
from qemu_dump_ext.qemu.gdbstub import stub_on_demand
from qemu_dump_ext.qemu.monitor_queries import (
    DEVICES,
    MEMORY_SIZE,
    ROOTS,
    VCPUS,
    VERSION,
    MachineObjects,
    find_devices,
    find_machine_objects,
    read_byte_order,
    read_number,
    read_property,
    read_register_texts,
    register_questions,
)
from qemu_dump_ext.qemu.monitor_text import (
    FLAT_VIEWS,
    RUNNING,
    parse_readable_ranges,
    parse_status,
    parse_version,
)
from qemu_dump_ext.qemu.native_dump import NativeDumps
from qemu_dump_ext.qemu.process import find_qemu_process
from qemu_dump_ext.qemu.target_name import target_by_program, target_by_qmp, target_name
from qemu_dump_ext.registers.from_native_notes import NativeNotes, parse_native_notes
from qemu_dump_ext.registers.from_stub import read_g_packet
from qemu_dump_ext.registers.merge import merge_readings, parse_monitor_registers, read_stub
from qemu_dump_ext.registers.notes import encode_vcpu_notes
from qemu_dump_ext.structures.dialect import MENDED, QemuVersion
from qemu_dump_ext.value import Value

_KVM = "info kvm"
_IT_RUNS = "the guest runs, and QEMU would stop it for a dump"
_ONE_NAME_FOR_BOTH_BYTE_ORDERS: QemuVersion = (10, 1, 0)
"""From here on, or later, QMP may answer `sh4` for sh4eb, and `xtensa` for xtensaeb."""


class ProbedGuest(Value):
    """What the monitor, the stub and QEMU's own notes say.

    Attributes:
        version: Of QEMU.
        architecture: Of the guest.
        ram_blocks: By ascending gpa.
        readable_ranges: What a page table may map as memory: (first, end), ascending.
        vcpus: In QEMU's order, which is that of their making.
        guest_note: From the vmcoreinfo device; None where QEMU's own notes could not be had,
            though there is such a device.
        native_refusal: Why QEMU's own notes could not be had, or None.
        dumps_forbidden: Why QEMU must not be asked for dumps of its own, or None: it may.
        guessed: Registers of which only those notes would tell every bit.
        machine: QOM type of the machine.
        left_out: What of its memory does not go into a dump, in words.
        doubts: What could not be found out, in words.
        shown_first: Registers of each vCPU by cpu_index, as the monitor showed them at first.
        properties: Of the CPU object, by our names of registers.
    """

    version: QemuVersion
    architecture: Architecture
    ram_blocks: Sequence[RamBlock]
    readable_ranges: Sequence[tuple[int, int]]
    vcpus: Sequence[Vcpu]
    guest_note: bytes | None
    native_refusal: str | None
    dumps_forbidden: str | None = None
    guessed: Collection[str] = ()
    machine: str = ""
    left_out: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    shown_first: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    properties: Mapping[str, int] = field(default_factory=dict)


class _Target(Value):
    """What a guest is, whether it runs or not."""

    version: QemuVersion
    architecture: Architecture
    machine: str
    dumped: DumpedMemory
    readable_ranges: Sequence[tuple[int, int]]
    dumps_forbidden: str | None
    native_dumps: NativeDumps
    register_texts: Mapping[int, str]
    properties: Mapping[str, int]


def ask_before_stopping(access: GuestAccess) -> None:
    """Ask, all at once, what does not change while QEMU runs: it takes nothing of a pause then.

    Raises:
        SourceError: The monitor does not answer.
    """
    with suppress(MonitorAnswerError):  # who needs it is told
        access.lasting.ask((MEMORY_SIZE, VERSION, WHO_LISTENS, CONFIDENTIAL, _KVM, *ROOTS))


def find_machine(access: GuestAccess) -> MachineObjects:
    """Return the machine and one of its CPUs, of the target that QMP names, if it names one.

    Raises:
        SourceError: The monitor does not answer, or there is no CPU.
    """
    return find_machine_objects(access.lasting, _cpu_suffixes(target_by_qmp(access)))


def _probe_target(access: GuestAccess, forbidden: str | None, stub: Stub | None) -> _Target:
    monitor, lasting = access.monitor, access.lasting
    version = parse_version(lasting.execute(VERSION))
    target = target_by_qmp(access)
    objects = find_machine(access)
    if not objects.cpu_type.endswith(_cpu_suffixes(target)):
        target = None
    forbidden = forbidden or why_dumps_are_forbidden(lasting)
    native_dumps = NativeDumps(monitor, access.qmp, forbidden)
    # Devices can be plugged, memory and vCPUs among them: that is asked anew each time.
    now = AskedOnce(monitor, dict(access.answers))
    flat_views, *_ = now.ask((FLAT_VIEWS, VCPUS, *DEVICES))
    dumped = find_dumped_memory(now, native_dumps, flat_views)
    texts = read_register_texts(now)
    clues = TargetClues(
        texts[min(texts)],
        partial(read_property, monitor, objects.cpu_path),
        _target_name(access, version),
        lambda: read_byte_order(monitor, dumped.blocks),
        lambda: read_g_packet(stub, min(texts)) if stub else b"",
    )
    architecture = architecture_for_cpu_types({objects.cpu_type}, clues, target)
    properties = {
        register.name: number
        for register in architecture.registers
        if register.qom
        and (number := read_number(monitor, objects.cpu_path, register.qom)) is not None
    }
    return _Target(
        version,
        architecture,
        objects.machine_type,
        dumped,
        parse_readable_ranges(flat_views),
        forbidden,
        native_dumps,
        texts,
        properties,
    )


def _cpu_suffixes(target: str | None) -> tuple[str, ...]:
    return tuple(known.cpu_type_suffix for known in architectures_of_target(target).values())


def probe_running_guest(access: GuestAccess) -> ProbedGuest:
    """Find out what of a guest that runs would be dumped; it is not stopped for that.

    Returns:
        Its vCPUs without registers, for these change meanwhile; no note.

    Raises:
        SourceError: The monitor does not answer.
        UnsupportedTargetError: No architecture file describes the guest.
    """
    target = _probe_target(access, _IT_RUNS, None)
    return ProbedGuest(
        target.version,
        target.architecture,
        target.dumped.blocks,
        target.readable_ranges,
        tuple(Vcpu(index, {}) for index in target.register_texts),
        guest_note=b"",
        native_refusal=None,
        dumps_forbidden=target.dumps_forbidden,
        machine=target.machine,
        left_out=target.dumped.left_out,
        doubts=target.dumped.doubts,
        properties=target.properties,
    )


def probe_guest(access: GuestAccess) -> ProbedGuest:
    """Find out what would be dumped; the guest must be stopped.

    Raises:
        SourceError: The monitor or the stub does not answer.
        UnsupportedTargetError: No architecture file describes the guest.
    """
    monitor = access.monitor
    target = _probe_target(access, None, access.stub)
    architecture, texts = target.architecture, target.register_texts
    ram_blocks = target.dumped.blocks
    native, refusal = NativeNotes({}, b""), None
    try:
        if ram_blocks:
            content = target.native_dumps.dump_byte(ram_blocks[0].gpa)
            native = parse_native_notes(content, architecture, list(texts))
    except SourceError as error:
        refusal = str(error)
    hardware_segments = "enabled" in access.lasting.execute(_KVM)
    by_stub = read_stub(architecture, access.stub) if access.stub else {}
    by_monitor = parse_monitor_registers(architecture, texts)
    readings = {
        index: VcpuReadings(
            gdb=by_stub.get(index, {}),
            monitor=by_monitor[index],
            native=native.vcpus.get(index, {}),
            hardware_segments=hardware_segments,
            native_byte_order=native.byte_order,
            qom=target.properties,
        )
        for index in texts
    }
    vcpus = _merged(architecture, readings)
    if access.stub is None and _stub_has_more(target, vcpus):
        with suppress(SourceError):
            by_stub = _read_stub_on_demand(architecture, access)
            readings = {
                index: replace(known, gdb=by_stub.get(index, {}))
                for index, known in readings.items()
            }
            vcpus = _merged(architecture, readings)
    guessed = {
        name for known in readings.values() for name in architecture.guessed_registers(known)
    }
    unknown_note = refusal is not None and bool(find_devices(monitor, "vmcoreinfo"))
    return ProbedGuest(
        target.version,
        architecture,
        ram_blocks,
        target.readable_ranges,
        vcpus,
        guest_note=None if unknown_note else native.guest_note,
        native_refusal=refusal,
        dumps_forbidden=target.dumps_forbidden,
        guessed=sorted(guessed),
        machine=target.machine,
        left_out=target.dumped.left_out,
        doubts=target.dumped.doubts,
        shown_first=by_monitor,
        properties=target.properties,
    )


def _merged(architecture: Architecture, readings: Mapping[int, VcpuReadings]) -> tuple[Vcpu, ...]:
    return tuple(
        Vcpu(index, merge_readings(architecture, known)) for index, known in readings.items()
    )


def _stub_has_more(target: _Target, vcpus: Sequence[Vcpu]) -> bool:
    """Tell whether a note lacks a register which a gdbstub may have."""
    architecture = target.architecture
    core = architecture.select_core(vcpus, target.dumped.blocks, MENDED, target.machine)
    notes = encode_vcpu_notes(architecture, core, vcpus, kernel_gs_base=False)
    known = {register.name for register in architecture.registers if register.gdb}
    return any(known.intersection(names) for names in notes.missing.values())


def _read_stub_on_demand(
    architecture: Architecture, access: GuestAccess
) -> dict[int, dict[str, int]]:
    pid = access.pid or find_qemu_process(access.addresses)
    with stub_on_demand(access, pid) as stub:
        return read_stub(architecture, stub)


def check_undisturbed(monitor: Monitor, guest: ProbedGuest) -> None:
    """Notice when somebody else let the guest run, or reset it, since it was probed.

    Only registers of notes are compared: others go on counting while the guest is stopped.

    Raises:
        GuestDisturbedError: It runs, or a register changed.
    """
    now = AskedOnce(monitor)
    status, *_ = now.ask(("info status", VCPUS, *register_questions(guest.shown_first)))
    running = parse_status(status) == RUNNING
    texts = read_register_texts(now)
    if running or parse_monitor_registers(guest.architecture, texts) != guest.shown_first:
        raise GuestDisturbedError


def _target_name(access: GuestAccess, version: QemuVersion) -> Callable[[], str | None]:
    if version >= _ONE_NAME_FOR_BOTH_BYTE_ORDERS:
        return lambda: target_by_program(access)
    return lambda: target_name(access)
