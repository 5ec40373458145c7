"""Registers from the notes of a dump that exists, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from qemu_dump_ext.architectures import Architecture, Core, VcpuReadings
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.registers.merge import merge_readings
from qemu_dump_ext.registers.notes import (
    DecodedNotes,
    decode_vcpu_registers,
    encode_vcpu_notes,
)
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.elf_notes import Note, encode_note
from qemu_dump_ext.structures.vmcoreinfo import VMCOREINFO_NOTE_NAME
from qemu_dump_ext.value import Value

_VCPUS_MAX = 1 << 12
"""More than QEMU makes; a file that says otherwise is not believed."""


class DumpForm(Protocol):
    """What is known of a dump besides its notes."""

    @property
    def byte_order(self) -> ByteOrder:
        """Of all that is in it."""

    @property
    def word_size(self) -> int:
        """4 or 8 bytes, as the dump's headers have it."""


class DumpNotes(Value):
    """The notes of a dump, taken apart.

    Attributes:
        core: The form of the notes; None: of no form that we know.
        vcpus: Registers in the order of the notes; empty where none are known.
        as_they_are: Notes that say of the vCPUs what registers do not; to be kept as they are,
            instead of notes made of registers. None: registers say it all.
        others: Notes of neither vCPUs nor the kernel, encoded.
    """

    core: Core | None
    vcpus: Sequence[Vcpu]
    as_they_are: bytes | None
    others: bytes


def encode_notes(notes: Iterable[Note], byte_order: ByteOrder) -> bytes:
    """Return notes as they stand in a dump."""
    return b"".join(
        encode_note(note.name, note.type, note.descriptor, byte_order) for note in notes
    )


def read_dump_notes(architecture: Architecture, form: DumpForm, notes: Sequence[Note]) -> DumpNotes:
    """Take the notes of a dump apart.

    Args:
        architecture: Of the guest.
        form: Of the dump.
        notes: All of them; those of the kernel are left out.
    """
    exact = exact_dump_notes(architecture, form, notes)
    if exact is not None:
        return exact
    notes = _of_no_kernel(notes)
    core, vcpus = next(
        ((core, vcpus) for core, vcpus, _ in _decoded(architecture, form, notes)), (None, ())
    )
    return DumpNotes(core, vcpus, encode_notes(notes, form.byte_order), b"")


def exact_dump_notes(
    architecture: Architecture, form: DumpForm, notes: Sequence[Note]
) -> DumpNotes | None:
    """Return notes as `read_dump_notes`; None unless registers say all that is in them."""
    notes = _of_no_kernel(notes)
    for core, vcpus, count in _decoded(architecture, form, notes):
        if encode_notes(notes[:count], form.byte_order) in _encoded(architecture, core, vcpus):
            return DumpNotes(core, vcpus, None, encode_notes(notes[count:], form.byte_order))
    return None


def _of_no_kernel(notes: Sequence[Note]) -> Sequence[Note]:
    return [note for note in notes if note.name != VMCOREINFO_NOTE_NAME]


def _decoded(
    architecture: Architecture, form: DumpForm, notes: Sequence[Note]
) -> Iterator[tuple[Core, Sequence[Vcpu], int]]:
    """Yield each form that the notes have, their vCPUs, and how many notes are of these."""
    # Forms that differ in their words alone have the same notes.
    for core in sorted(architecture.cores, key=lambda core: core.word_size != form.word_size):
        count = _vcpu_count(core, notes)
        if core.byte_order == form.byte_order and 0 < count <= _VCPUS_MAX:
            decoded = decode_vcpu_registers(architecture, core, notes, count)
            if decoded is not None:
                yield core, _vcpus_of(architecture, core, decoded), decoded.count


def _vcpu_count(core: Core, notes: Sequence[Note]) -> int:
    first = core.notes[0]
    return sum((note.name, note.type) == (first.owner, first.type) for note in notes)


def _vcpus_of(architecture: Architecture, core: Core, decoded: DecodedNotes) -> Sequence[Vcpu]:
    told = [pid - 1 for pid in decoded.pids]
    # Some notes have no pid, and those of a kernel in the guest the pids of its tasks.
    numbered = min(told) >= 0 and len(set(told)) == len(told)
    return tuple(
        Vcpu(number if numbered else place, _registers_of(architecture, core, values))
        for place, (number, values) in enumerate(zip(told, decoded.vcpus, strict=True))
    )


def _registers_of(
    architecture: Architecture, core: Core, values: Mapping[str, int]
) -> Mapping[str, int]:
    # Nothing is guessed of what a note has not.
    readings = VcpuReadings(
        gdb={},
        monitor={},
        native=values,
        hardware_segments=True,
        native_byte_order=core.byte_order,
    )
    return merge_readings(architecture, readings)


def _encoded(architecture: Architecture, core: Core, vcpus: Sequence[Vcpu]) -> list[bytes]:
    """Return the notes of these vCPUs as old and as new versions of QEMU write them."""
    return [
        encode_vcpu_notes(architecture, core, vcpus, kernel_gs_base=with_it).data
        for with_it in (True, False)
    ]
