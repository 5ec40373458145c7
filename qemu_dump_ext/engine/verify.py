"""Find damage in a dump: every header field, descriptor and page is looked at.

What a format gives no means to find is not found: memory in ELF, raw pages and, but for what
contradicts their coding, lzo and snappy pages carry no checksum.
"""

from __future__ import annotations

from qemu_dump_ext.dump_readers import DumpFile, OrderedPool, Progress, VerifyReport, reader_of
from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.host_limits import WorkerThreads


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
    with WorkerThreads(workers, "verify") as threads:
        pool = OrderedPool(threads, 2 * workers)
        for file in dump.files:
            for problem in file.image.problems:
                report.add_problem(problem)
            try:
                reader_of(file).verify(file, report, pool, progress)
            except CorruptDumpError as error:
                report.add_problem(error)
    return report
