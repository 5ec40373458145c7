"""Unpack the pages of a kdump, many at a time in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.host_limits import WorkerThreads
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.page_codecs import Decompress
from qemu_dump_ext.pages.pipeline import worker_count

if TYPE_CHECKING:
    from qemu_dump_ext.dump_readers.kdump import KdumpFile

Descriptor: TypeAlias = tuple[int, int, int, int]
"""offset, size, flags, page_flags, as in struct page_desc."""
JobT = TypeVar("JobT")

_SLACK = 1 << 16
"""Bytes between pages that are rather read than stepped over."""
_THREADS_MAX = 4
"""More wait for the interpreter's lock: what unpacks a page gives it away for 10 us at a time."""


class PageUnpacker:
    """Turns page descriptors into pages. One for each thread."""

    def __init__(self, dump: KdumpFile) -> None:
        self._dump = dump
        self._decompressors: dict[int, Decompress] = {}

    def unpack(
        self, descriptors: Sequence[Descriptor]
    ) -> Iterator[bytes | memoryview | CorruptDumpError]:
        """Yield, for each descriptor, its page or what is wrong with it.

        Raises:
            CodecUnavailableError: A page is packed by a codec that cannot be imported.
        """
        for descriptor, data in zip(descriptors, self.stored(descriptors), strict=True):
            offset, _, flags, _ = descriptor
            if isinstance(data, CorruptDumpError) or not flags:
                yield data
                continue
            try:
                yield self._decompress(flags, data)
            except CorruptDumpError as error:
                yield _at(offset, error)

    def stored(
        self, descriptors: Sequence[Descriptor]
    ) -> Iterator[bytes | memoryview | CorruptDumpError]:
        """Yield, for each descriptor, its page as it is in the file, or what is wrong with it."""
        dump = self._dump
        zero_page = dump.zero_page_descriptor
        faults = {
            index: fault
            for index, descriptor in enumerate(descriptors)
            if (fault := dump.descriptor_fault(descriptor))
        }
        own = [
            descriptor
            for index, descriptor in enumerate(descriptors)
            if descriptor != zero_page and index not in faults
        ]
        low = min((offset for offset, *_ in own), default=0)
        high = max((offset + size for offset, size, *_ in own), default=0)
        # Pages of one batch lie together in the file of every known writer.
        together = high - low <= 2 * sum(size for _, size, *_ in own) + _SLACK
        data = memoryview(dump.image.read(low, high - low)) if together else None
        for index, descriptor in enumerate(descriptors):
            if index in faults:
                yield CorruptDumpError(faults[index])
                continue
            if descriptor == zero_page:
                yield dump.zero_page
                continue
            offset, size, _, _ = descriptor
            if data is not None:
                yield data[offset - low : offset - low + size]
                continue
            try:
                yield memoryview(dump.image.read(offset, size))
            except CorruptDumpError as error:
                yield _at(offset, error)

    def _decompress(self, flags: int, packed: bytes | memoryview) -> bytes:
        decompress = self._decompressors.get(flags)
        if decompress is None:
            decompress = self._dump.codecs_by_flag[flags].decompressor()
            self._decompressors[flags] = decompress
        return decompress(packed, self._dump.page_size)


def _at(offset: int, error: CorruptDumpError) -> CorruptDumpError:
    return CorruptDumpError(f"page data at offset {offset:#x}: {error}")


class UnpackingThreads:
    """Threads that each have a `PageUnpacker`; they are started when there is work for several."""

    def __init__(self, dump: KdumpFile) -> None:
        self._dump = dump
        self._local = threading.local()
        self._threads: WorkerThreads | None = None

    def run(self, work: Callable[[PageUnpacker, JobT], None], jobs: Sequence[JobT]) -> None:
        """Do all jobs, in any order, and raise what the first one of those that fail raises."""
        count = min(self._dump.threads or worker_count(), _THREADS_MAX)
        if len(jobs) == 1 or count == 1:
            for job in jobs:
                self._do(work, job)
            return
        if self._threads is None:
            self._threads = WorkerThreads(count, "unpack")
        with uninterrupted():  # none of them writes to a buffer of which nobody knows any more
            begun = [self._threads.submit(self._do, work, job) for job in jobs]
            errors = [one.error() for one in begun]
        for error in errors:
            if error is not None:
                raise error

    def _do(self, work: Callable[[PageUnpacker, JobT], None], job: JobT) -> None:
        if not hasattr(self._local, "unpacker"):
            self._local.unpacker = self._dump.unpacker()
        work(self._local.unpacker, job)

    def close(self) -> None:
        """End them."""
        if self._threads is not None:
            self._threads.close()
