"""Find damage in a dump: every header field, descriptor and page is looked at.

What a format gives no means to find is not found: memory in ELF, raw pages and, but for what
contradicts their coding, lzo and snappy pages carry no checksum.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers._elf_verifier import verify_elf_core
from qemu_dump_ext.dump_readers._kdump_verifier import KdumpVerifier
from qemu_dump_ext.dump_readers._verify_report import OrderedPool, Progress, VerifyReport
from qemu_dump_ext.dump_readers.elf import ElfCoreFile
from qemu_dump_ext.dump_readers.kdump import KdumpFile
from qemu_dump_ext.errors import CorruptDumpError


def verify_dump(
    dump: DumpFile, *, workers: int = 2, progress: Progress = lambda _done, _total: None
) -> VerifyReport:
    """Look at everything in `dump`.

    Args:
        dump: Not used by anyone else meanwhile.
        workers: Threads that read and unpack.
        progress: See `Progress`.

    Raises:
        CodecUnavailableError: Pages are packed by a codec that cannot be imported.
    """
    report = VerifyReport()
    for problem in dump.image.problems:
        report.add_problem(problem)
    _verify_notes(dump, report)
    with ThreadPoolExecutor(workers) as executor:
        pool = OrderedPool(executor, 2 * workers)
        try:
            if isinstance(dump, KdumpFile):
                KdumpVerifier(dump, report).verify(pool, progress)
            elif isinstance(dump, ElfCoreFile):
                verify_elf_core(dump, report, pool, progress)
        except CorruptDumpError as error:
            report.add_problem(error)
    return report


def _verify_notes(dump: DumpFile, report: VerifyReport) -> None:
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
