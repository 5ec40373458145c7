"""Find damage in the notes of a dump."""

from __future__ import annotations

from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers._verify_report import VerifyReport
from qemu_dump_ext.errors import CorruptDumpError


def verify_notes(dump: DumpFile, report: VerifyReport) -> None:
    """Verify the notes of a dump that has those of every vCPU."""
    try:
        notes = dump.notes
        vmcoreinfo = dump.vmcoreinfo
    except CorruptDumpError as error:
        report.add_problem(error)
        return
    vcpus = sum(note.is_prstatus for note in notes)
    qemu_notes = sum(note.name == "QEMU" for note in notes)
    expected = dump.header.get("nr_cpus", vcpus or "at least 1")
    report.expect(vcpus == expected, f"{vcpus} NT_PRSTATUS notes, there should be {expected}")
    report.expect(
        qemu_notes in {0, vcpus}, f"{qemu_notes} QEMU notes beside {vcpus} NT_PRSTATUS notes"
    )
    for note in notes:
        report.expect(
            not note.is_prstatus or dump.pid_of(note) is not None,
            f"NT_PRSTATUS at offset {note.offset:#x} is too short",
        )
    inside = [note.descriptor for note in notes if note.name == "VMCOREINFO"]
    if inside and vmcoreinfo is None:
        report.remarks.append("the sub-header does not know of the VMCOREINFO note")
    elif inside and inside[0].partition(b"\0")[0] != vmcoreinfo:
        report.add_problem("VMCOREINFO of the sub-header is not that of the notes")
