"""Encode and decode the notes of vCPUs. Pure: registers in, bytes out, and back.

Source: QEMU dump/dump.c write_elf_notes() for the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qemu_dump_ext.architectures import Architecture, Core, NoteLayout
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.elf_notes import Note, encode_note
from qemu_dump_ext.value import Value

KERNEL_GS_BASE = "kernel_gs_base"
QEMU_NOTE_SIZE_WITHOUT_KERNEL_GS_BASE = 432
_PID = "pr_pid"


class EncodedNotes(Value):
    """The notes of all vCPUs.

    Attributes:
        data: As in the file.
        missing: Register names that no source gave, by note and cpu_index; zero in `data`.
        sizes: The sizes of the notes of each vCPU, in bytes, by cpu_index.
    """

    data: bytes
    missing: Mapping[tuple[str, int], Sequence[str]]
    sizes: Mapping[int, int]


def encode_vcpu_notes(
    architecture: Architecture, core: Core, vcpus: Sequence[Vcpu], *, kernel_gs_base: bool = True
) -> EncodedNotes:
    """Encode the notes of all vCPUs.

    Args:
        architecture: Tells which members of a note are registers.
        core: Declares the notes and their byte order.
        vcpus: The vCPUs in the order of their notes.
        kernel_gs_base: The note `QEMU` ends with that register, as since QEMU 3.0; otherwise it
            ends before.

    Returns:
        The notes of each vCPU, then those that stand after all of them.
    """
    known = {register.name for register in architecture.registers}
    missing: dict[tuple[str, int], Sequence[str]] = {}
    data = bytearray()
    sizes = dict.fromkeys((vcpu.index for vcpu in vcpus), 0)
    for after in (False, True):
        for vcpu in vcpus:
            for layout in core.notes:
                if layout.after_all_vcpus == after:
                    encoded = _encode_descriptor(layout, core.byte_order, vcpu, known)
                    if encoded is None:
                        continue
                    descriptor, absent = encoded
                    if layout.owner == "QEMU" and not kernel_gs_base:
                        descriptor = _shorten_qemu_note(descriptor)
                        absent = [name for name in absent if name != KERNEL_GS_BASE]
                    if absent:
                        key = layout.owner, vcpu.index
                        missing[key] = sorted({*missing.get(key, ()), *absent})
                    note = encode_note(layout.owner, layout.type, descriptor, core.byte_order)
                    data += note
                    sizes[vcpu.index] += len(note)
    return EncodedNotes(bytes(data), missing, sizes)


def _encode_descriptor(
    layout: NoteLayout, byte_order: ByteOrder, vcpu: Vcpu, known: set[str]
) -> tuple[bytes, list[str]] | None:
    structure = layout.bind_for(vcpu.registers, byte_order)
    if structure is None:
        return None
    values: dict[str, int | bytes] = dict(layout.constants)
    if _PID in structure.offsets:
        values[_PID] = vcpu.index + 1
    absent = []
    for member in structure.offsets.keys() & known:
        if member in vcpu.registers:
            values[member] = structure.truncate(member, vcpu.registers[member])
        else:
            absent.append(member)
    return structure.pack(**values), absent


def _shorten_qemu_note(descriptor: bytes) -> bytes:
    size = QEMU_NOTE_SIZE_WITHOUT_KERNEL_GS_BASE
    return descriptor[:4] + size.to_bytes(4, "little") + descriptor[8:size]


class DecodedNotes(Value):
    """The notes of all vCPUs, as registers.

    Attributes:
        vcpus: Registers by name, in the order of the notes: one mapping for each vCPU.
        count: How many notes they were.
        pids: pr_pid of each vCPU, which is its cpu_index + 1; 0 where the notes have none.
    """

    vcpus: Sequence[Mapping[str, int]]
    count: int
    pids: Sequence[int]


def decode_vcpu_registers(
    architecture: Architecture, core: Core, notes: Sequence[Note], vcpu_count: int
) -> DecodedNotes | None:
    """Decode the notes of all vCPUs back into registers.

    A register that several notes hold is taken from the one in which it is widest.

    Returns:
        None where the notes are not those of this core.
    """
    known = {register.name for register in architecture.registers}
    found: list[list[tuple[NoteLayout, Mapping[str, int]]]] = [[] for _ in range(vcpu_count)]
    position = 0
    for after in (False, True):
        for decoded in found:
            for layout in core.notes:
                if layout.after_all_vcpus != after:
                    continue
                values = _decode_note(layout, core.byte_order, notes[position : position + 1])
                if values is not None:
                    decoded.append((layout, values))
                    position += 1
                elif layout.choose is None:
                    return None
    vcpus: list[dict[str, int]] = []
    pids = []
    for decoded in found:
        registers: dict[str, int] = {}
        pids.append(max((values.get(_PID, 0) for _, values in decoded), default=0))
        for _, values in sorted(decoded, key=lambda item: item[0].max_align):
            registers |= {name: values[name] for name in values.keys() & known}
        vcpus.append(registers)
    return DecodedNotes(vcpus, position, pids)


def _decode_note(
    layout: NoteLayout, byte_order: ByteOrder, notes: Sequence[Note]
) -> Mapping[str, int] | None:
    for note in notes:
        if (note.name, note.type) == (layout.owner, layout.type):
            structure = layout.bind_of_size(len(note.descriptor), byte_order)
            if structure is not None:
                return structure.unpack_integers(note.descriptor)
    return None
