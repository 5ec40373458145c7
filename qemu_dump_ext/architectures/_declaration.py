"""What one file of this folder must declare.

An architecture is data: which registers exist, what each source calls them, and which notes hold
them. What only the running guest knows (is it in long mode?) selects among declared cores, once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING

from qemu_dump_ext.architectures._page_tables import Translation
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import U64_MAX, Abi, BoundStruct, ByteOrder, StructLayout
from qemu_dump_ext.structures.dialect import Dialect, QemuVersion
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number
from qemu_dump_ext.value import Value

if TYPE_CHECKING:
    from qemu_dump_ext.structures.migration import DeviceFields


class Register(Value):
    """One register that a note holds, with a column for each source of its value.

    Attributes:
        name: Ours; the members of notes have the same names.
        gdb: Name in the stub's target description; None where the stub does not have it.
        monitor: Names in `info registers`, the first that is there counts.
        qom: Property of the CPU object, for what is none of the stub's registers.
    """

    name: str
    gdb: str | None = None
    monitor: tuple[str, ...] = ()
    qom: str | None = None


class NoteLayout(Value):
    """A note of each vCPU.

    Attributes:
        owner: Name of the note, without the terminating NUL.
        type: n_type.
        layout: The layout of the descriptor. A member that is named like a register holds that
            register, cut to its width; `pr_pid` holds cpu_index + 1; all others are constant.
        alternatives: Other layouts that `choose` may return, or that a version of QEMU writes;
            no two have the same size.
        choose: Decides which layout a vCPU has from its registers; None where it has no such
            note. Without, every vCPU has `layout`.
        max_align: Largest alignment inside the descriptor, in bytes.
        constants: Members that are neither a register nor 0.
        after_all_vcpus: Stands behind the notes of all vCPUs instead of among them.
    """

    owner: str
    type: int
    layout: StructLayout
    max_align: int
    constants: Mapping[str, int] = field(default_factory=dict)
    after_all_vcpus: bool = False
    alternatives: tuple[StructLayout, ...] = ()
    choose: Callable[[Mapping[str, int]], StructLayout | None] | None = None

    def bind(self, byte_order: ByteOrder, layout: StructLayout | None = None) -> BoundStruct:
        """Return the descriptor's structure: that of `layout`, or of the usual one."""
        abi = Abi(byte_order, word_size=self.max_align, max_align=self.max_align)
        return (layout or self.layout).bind(abi)

    def bind_for(self, registers: Mapping[str, int], byte_order: ByteOrder) -> BoundStruct | None:
        """Return the structure for a vCPU, or None where it has no such note."""
        layout = self.layout if self.choose is None else self.choose(registers)
        return None if layout is None else self.bind(byte_order, layout)

    def bind_of_size(self, size: int, byte_order: ByteOrder) -> BoundStruct | None:
        """Return the structure of a descriptor of `size` bytes, or None where there is none."""
        structures = (self.bind(byte_order, layout) for layout in (self.layout, *self.alternatives))
        return next((structure for structure in structures if structure.size == size), None)


class Core(Value):
    """The form of a dump: what the ELF header, or the kdump header, says about the guest.

    Attributes:
        e_machine: EM_* of the ELF header.
        byte_order: The byte order of every structure in the dump.
        word_size: 8 for ELFCLASS64 and the 64-bit kdump headers, 4 for the others.
        notes: The notes of each vCPU, in order.
        uname_machine: What `uname -m` prints in such a guest.
        e_flags: The `e_flags` of the ELF header.
        os_abi: EI_OSABI of the ELF header, for targets whose notes gdb knows by it alone.
        of_others: Only other writers lay notes out like this: it is read, and written with --exact.
        u64_align: Alignment of 64-bit integers in the guest's C structures, in bytes.
    """

    e_machine: int
    byte_order: ByteOrder
    word_size: int
    notes: tuple[NoteLayout, ...]
    uname_machine: str
    e_flags: int = 0
    u64_align: int = 8
    os_abi: int = 0
    of_others: bool = False


class MachineRam(Value):
    """How the RAM of a machine lies in guest physical memory, as QEMU's source has it.

    Attributes:
        machine: How its type begins, such as `pc-q35-`.
        windows: Of its main memory: gpa, offset in the memory, and size or None for the rest;
            by ascending gpa. What is in none of them cannot be seen by the guest.
        size_min: The size of the memory from which on it is so, in bytes.
        others: Where other RAM blocks begin, by their names.
        ends: Where other RAM blocks end, by their names.
        screen: First gpa of what a graphics card shows instead of memory, where there is one, and
            the end of it.
    """

    machine: str
    windows: tuple[tuple[int, int, int | None], ...]
    size_min: int = 0
    others: Mapping[str, int] = field(default_factory=dict)
    ends: Mapping[str, int] = field(default_factory=dict)
    screen: tuple[int, int] = (0, 0)

    @property
    def names(self) -> tuple[str, ...]:
        """What users call it."""
        name = self.machine.rstrip("-")
        return tuple(dict.fromkeys((name, name.removeprefix("pc-"))))

    def windows_of(self, size: int) -> tuple[tuple[int, int, int], ...]:
        """Return where it has main memory of `size` bytes: gpa, offset in the memory, size."""
        found = []
        for gpa, offset, length in self.windows:
            end = size if length is None else min(offset + length, size)
            if offset < end:
                found.append((gpa, offset, end - offset))
        return tuple(found)


class MigratedCpu(Value):
    """What a vCPU's section of QEMU's migration stream calls its registers.

    Attributes:
        recognize: Tells whether a section is one of this target.
        fields: Names of the fields by our names of registers; the first that is there counts.
        derive: Returns registers that are no field of their own; None where all are.
        absent_is_zero: Registers that the processor does not have where the section has not.
        needed_for: Registers without which a part of a section makes no note, by its name.
    """

    recognize: Callable[[DeviceFields], bool]
    fields: Mapping[str, tuple[str, ...]]
    derive: Callable[[DeviceFields], Mapping[str, int]] | None = None
    absent_is_zero: frozenset[str] = frozenset()
    needed_for: Mapping[str, str] = field(default_factory=dict)

    def registers(self, section: DeviceFields) -> Mapping[str, int]:
        """Return the registers in a section by our names."""
        values: dict[str, int] = dict.fromkeys(self.absent_is_zero, 0)
        for register, names in self.fields.items():
            found = (section.integer(name) for name in names)
            value = next((value for value in found if value is not None), None)
            if value is not None:
                values[register] = value
        return {**values, **self.derive(section)} if self.derive else values


def field_names(registers: str, *patterns: str) -> dict[str, tuple[str, ...]]:
    """Return the fields of registers that follow each other.

    Args:
        registers: Their names, separated by blanks.
        patterns: Of the fields, with `{}` for the number of each, from 0.
    """
    return {
        register: tuple(pattern.format(number) for pattern in patterns)
        for number, register in enumerate(registers.split())
    }


class VcpuReadings(Value):
    """What the sources say about one vCPU, each by our register names.

    Attributes:
        gdb: The registers from the stub; empty where there is none.
        monitor: The registers from `info registers`.
        native: The registers from the notes of a dump of one byte that QEMU wrote; empty where it
            could not.
        hardware_segments: An accelerator runs the guest, not the translator of QEMU.
        native_byte_order: The native byte order of that dump; None where there is none.
        qom: Properties of the CPU object.
    """

    gdb: Mapping[str, int]
    monitor: Mapping[str, int]
    native: Mapping[str, int]
    hardware_segments: bool
    native_byte_order: ByteOrder | None = None
    qom: Mapping[str, int] = field(default_factory=dict)


class TargetClues(Value):
    """What tells architectures apart whose CPUs have the same kind of QOM type.

    Attributes:
        register_text: `info registers` of the first vCPU.
        vcpu_property: Returns a QOM property of the first vCPU as text, or None where it has
            none of this name.
        target_name: Returns QEMU's name of the target, or None where the door cannot ask, or where
            QEMU has one name for both byte orders.
        memory_byte_order: Returns the byte order in which the monitor puts words of guest memory
            together, or None where no word tells it.
        g_packet: Returns the stub's answer to `g` for the first vCPU; empty where there is none.
    """

    register_text: str
    vcpu_property: Callable[[str], str | None]
    target_name: Callable[[], str | None] = lambda: None
    memory_byte_order: Callable[[], ByteOrder | None] = lambda: None
    g_packet: Callable[[], bytes] = lambda: b""


class FrameRecord(Value):
    """What a function leaves on the stack by which its caller is found.

    Attributes:
        pointer: Name of the register that has the address of the innermost record.
        caller: Where in it the address of the caller's record is, in bytes.
        returns_to: Where in it the address is at which the caller goes on, in bytes.
        entries: Regular expression of the functions by which something that interrupts begins.
    """

    pointer: str
    caller: int
    returns_to: int
    entries: str


class Architecture(Value):
    """One QEMU target.

    Attributes:
        name: QEMU's target name, as in qemu-system-NAME; equal to the name of the file.
        cpu_type_suffix: How the QOM types of its CPUs end.
        qemu_uname_machine: utsname.machine as QEMU writes it; see `Dialect.utsname`.
        registers: Every register of every note.
        cores: Every form that a dump may take.
        per_cpu_base: Tells from the registers of a vCPU where the kernel has the data of that CPU,
            which ascends with the kernel's number of it; None in it: not known. None where unknown.
        program_counter: Name of the register that tells where a vCPU is.
        kernel_pointers: Names of registers with addresses in the image of the kernel, whatever
            the vCPU does.
        page_size: The page size of kdump blocks, in bytes.
        phys_base_key: Line of VMCOREINFO that tells phys_base; None where none does.
        select_core: Decides which of `cores` the guest needs from its vCPUs, its RAM blocks, the
            dialect, and the QOM type of its machine.
        parse_monitor: Turns `info registers` of one vCPU into values by register name, for what
            is not of the form NAME=VALUE; None where everything is.
        reconcile: Merges the sources into the final values where precedence (stub, monitor,
            native notes) is not all; None where it is. A value that no source gives must be
            left out.
        guessed_by_reconcile: Names the registers that `reconcile` had to guess, in whole or in
            part; None where it guesses none.
        page_table_roots: Tells from the registers of a vCPU where its page tables begin; empty
            where it uses none. Gets True where they are to be read as QEMU's dump-guest-memory
            does, with what is wrong in it; see `paged_by_qemu`. A KeyError names what no source
            gave. None where it is unknown.
        paged_by_qemu: QEMU's own dump follows page tables; for all others, virtual addresses are
            physical ones in it.
        kernel_page_tables: Tells from VMCOREINFO's text and phys_base how kernel addresses are
            translated, by the kernel's own page tables (swapper_pg_dir) or without any; empty
            where they do not tell. None where unknown.
        dumped_by_qemu_since: The version of QEMU that first dumps this target itself; None: none.
        machine_page_sizes: `page_size` of machines whose type begins like this.
        phys_base_is_lowest: Where VMCOREINFO does not tell it, phys_base is the lowest gpa.
        pfn_from_phys_base: Readers count the page frames of a kdump from phys_base.
        recognize: Tells whether the clues fit, where the type of the CPUs is that of other
            architectures as well.
        stub_byte_order: The byte order of register values in the packets of the stub, where it
            depends on the registers themselves; None where it is that of the first core.
        correct_stub: Puts what the stub sends under the right names, where a version of QEMU
            describes other numbers than it answers to.
        g_packet: What a stub without target description sends for `g`, named as in the column
            `gdb`; each member as bytes.
        gdb_name: What gdb calls it, where the stub describes its registers; else gdb_settings tell.
        gdb_settings: What a gdb without symbols is to be told before it can connect.
        has_orc: The kernel may have ORC tables, by which callers are found.
        frame_record: How callers are found where the kernel is compiled with frame pointers, as
            it always is; None where that is not known.
        migrated: What QEMU's migration stream calls the registers; None where that is unknown.
        machines: Where machines have their RAM, for streams, which do not tell; of several that
            fit, the likely one first.
        runs_windows: A Windows of 32 or 64 bits of this target is known to `windows/`.
        windows_by_qemu: QEMU itself dumps such a guest as Windows does.
    """

    name: str
    cpu_type_suffix: str
    qemu_uname_machine: str
    registers: tuple[Register, ...]
    cores: tuple[Core, ...]
    program_counter: str
    page_size: int
    phys_base_key: str | None
    select_core: Callable[[Sequence[Vcpu], Sequence[RamBlock], Dialect, str], Core]
    parse_monitor: Callable[[str], Mapping[str, int]] | None = None
    reconcile: Callable[[VcpuReadings], Mapping[str, int]] | None = None
    per_cpu_base: Callable[[Mapping[str, int]], int | None] | None = None
    kernel_pointers: tuple[str, ...] = ()
    guessed_by_reconcile: Callable[[VcpuReadings], Collection[str]] | None = None
    page_table_roots: Callable[[Mapping[str, int], bool], Sequence[Translation]] | None = None
    paged_by_qemu: bool = False
    kernel_page_tables: Callable[[bytes, int | None], Sequence[Translation]] | None = None
    dumped_by_qemu_since: QemuVersion | None = (0, 0, 0)
    machine_page_sizes: Mapping[str, int] = field(default_factory=dict)
    phys_base_is_lowest: bool = False
    pfn_from_phys_base: bool = False
    recognize: Callable[[TargetClues], bool] | None = None
    stub_byte_order: Callable[[Mapping[str, bytes]], ByteOrder] | None = None
    correct_stub: Callable[[Mapping[str, bytes]], Mapping[str, bytes]] | None = None
    g_packet: StructLayout | None = None
    gdb_name: str = ""
    gdb_settings: tuple[str, ...] = ()
    has_orc: bool = False
    frame_record: FrameRecord | None = None
    migrated: MigratedCpu | None = None
    machines: tuple[MachineRam, ...] = ()
    runs_windows: bool = False
    windows_by_qemu: bool = False

    @property
    def name_in_gdb(self) -> str:
        """What a gdb must know to connect: its own name of this, or of what stands in for it."""
        return self.gdb_name or self.gdb_settings[0].removeprefix("set architecture ")

    def guessed_registers(self, readings: VcpuReadings) -> Collection[str]:
        """Return the names of registers whose value no source gave as it is."""
        return self.guessed_by_reconcile(readings) if self.guessed_by_reconcile else ()


def phys_base(architecture: Architecture, vmcoreinfo: bytes, *, is_hex: bool = False) -> int | None:
    """Return phys_base modulo 2**64 from VMCOREINFO's text, or None where it does not tell."""
    if architecture.phys_base_key is None:
        return None
    value = vmcoreinfo_number(vmcoreinfo, architecture.phys_base_key, 16 if is_hex else 0)
    return None if value is None else value & U64_MAX
