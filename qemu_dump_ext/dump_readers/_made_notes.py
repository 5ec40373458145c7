"""A dump that has the registers in a form of its own: its notes are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from qemu_dump_ext.architectures import Architecture, Core
from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers._notes_verifier import verify_notes
from qemu_dump_ext.dump_readers._range_headers import read_memory
from qemu_dump_ext.dump_readers._verify_report import OrderedPool, Progress, VerifyReport
from qemu_dump_ext.registers.notes import EncodedNotes, encode_vcpu_notes
from qemu_dump_ext.structures.elf_notes import Note, parse_notes


class MadeNotes(DumpFile):
    """What has the notes that a dump of its guest would have; none, where it has no vCPUs.

    Attributes:
        architecture: Of its guest, where it has vCPUs.
        core: The form of the notes, likewise.
    """

    architecture: Architecture
    core: Core

    @cached_property
    def _encoded(self) -> EncodedNotes:
        if not self.vcpus:
            return EncodedNotes(b"", {}, {})
        return encode_vcpu_notes(self.architecture, self.core, self.vcpus)

    @property
    def _other_notes(self) -> bytes:
        """Notes behind those of the vCPUs."""
        return b""

    @property
    def missing_registers(self) -> Mapping[str, Sequence[str]]:
        """Registers that it does not have, by what they belong to."""
        absent = self._encoded.missing
        return {f"{owner} of vCPU {index}": names for (owner, index), names in absent.items()}

    @property
    def lacking(self) -> Sequence[str]:
        """What of the guest is not in it, besides memory, in words."""
        registers = (
            f"{owner}: the {self.what} does not have {', '.join(names)}"
            for owner, names in self.missing_registers.items()
        )
        return (*super().lacking, *registers)

    what = "dump"
    """It, in words."""

    @cached_property
    def notes(self) -> tuple[Note, ...]:
        """The notes that a dump of this guest has; offsets are those among them."""
        area = self._encoded.data + self._other_notes
        return tuple(parse_notes(area, self.byte_order, 0))


def verify_registers_and_memory(
    dump: MadeNotes, report: VerifyReport, pool: OrderedPool, progress: Progress
) -> None:
    """Verify a dump that says nothing else."""
    if dump.vcpus:
        verify_notes(dump, report)
    else:
        report.remarks.append("it has no registers in a form that is known")
    for owner, names in dump.missing_registers.items():
        report.remarks.append(f"{owner}: the {dump.what} does not have {', '.join(names)}")
    read_memory(dump, report, pool, progress)
