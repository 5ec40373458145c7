"""Registers from the notes in a dump that QEMU itself wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qemu_dump_ext.architectures import Architecture
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.registers.notes import decode_vcpu_registers
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.elf import parse_elf_head
from qemu_dump_ext.structures.elf_notes import whole_notes
from qemu_dump_ext.value import Value


class NativeNotes(Value):
    """What such a dump tells.

    Attributes:
        vcpus: Registers by name, by cpu_index.
        guest_note: The guest's note, header included; empty where there is none.
        byte_order: The byte order of that dump; None where there is none.
    """

    vcpus: Mapping[int, Mapping[str, int]]
    guest_note: bytes
    byte_order: ByteOrder | None = None


def parse_native_notes(
    content: bytes, architecture: Architecture, indexes: Sequence[int]
) -> NativeNotes:
    """Take the notes of QEMU's own ELF dump apart.

    Args:
        content: The dump.
        architecture: The architecture of the guest.
        indexes: The cpu_index of each vCPU in QEMU's own order, which is that of their making.

    Raises:
        SourceError: It is no dump of this architecture.
    """
    head = parse_elf_head(content)
    header, phdr, byte_order = head.header, head.phdr, head.byte_order
    if len(content) < header["e_phoff"] + phdr.size:
        raise SourceError("QEMU's dump of one byte is cut")
    segment = phdr.unpack_integers(content, header["e_phoff"])  # PT_NOTE is the first
    area = content[segment["p_offset"] :][: segment["p_filesz"]]
    notes = whole_notes(area, byte_order)
    for core in architecture.cores:
        if (core.e_machine, core.byte_order) != (header["e_machine"], byte_order):
            continue
        decoded = decode_vcpu_registers(architecture, core, notes, len(indexes))
        if decoded is not None:
            guest_notes = notes[decoded.count :]
            start = guest_notes[0].offset if guest_notes else len(area)
            numbers = _indexes_by_notes(decoded.pids, indexes)
            vcpus = dict(zip(numbers, decoded.vcpus, strict=True))
            return NativeNotes(vcpus, area[start:], byte_order)
    raise SourceError("QEMU's dump of one byte has notes of another kind")


def _indexes_by_notes(pids: Sequence[int], indexes: Sequence[int]) -> Sequence[int]:
    # Some notes have no pid, or one in another byte order: see `Dialect.pid_unconverted`.
    told = [pid - 1 for pid in pids]
    return told if sorted(told) == sorted(indexes) else indexes
