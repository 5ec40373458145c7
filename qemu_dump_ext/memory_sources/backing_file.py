"""Memory in the file that backs it: memory-backend-file, -memfd or -shm with share=on.

The file is the one that QEMU has mapped, opened under QEMU's process, so that a memfd, a deleted
file and one in a container's mount namespace are found as well. Where the process cannot be looked
at, the path is asked of the backend. A hole of the file is memory that was never touched.

RAM blocks that are in no such file (firmware, video memory) are left to other sources.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.errors import GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest.access import Monitor, SourceContext
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.memory_sources._declaration import MemorySource
from qemu_dump_ext.memory_sources.process import HostSegment, locate_blocks
from qemu_dump_ext.qemu.process import MemoryMapping, find_qemu_process
from qemu_dump_ext.value import Value


class FilePart(Value):
    """Where a RAM block is.

    Attributes:
        descriptor: The descriptor of the file.
        offset: The offset of the block in it, in bytes.
    """

    descriptor: int
    offset: int


class BackingFileMemory:
    """Guest memory in files.

    Attributes:
        missing_blocks: Those in no file.
    """

    name = "backing_file"
    is_slow = False
    is_at_hand = True

    def __init__(self, parts: Mapping[RamBlock, FilePart], missing: Sequence[RamBlock]) -> None:
        """Read `parts`, which go by ascending gpa."""
        self.missing_blocks = missing
        self._blocks = list(parts)
        self._starts = [block.gpa for block in self._blocks]
        self._parts = list(parts.values())

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        part, offset = self._place(gpa, len(buffer))
        while buffer:
            try:
                count = os.preadv(part.descriptor, [buffer], offset)
            except OSError as error:
                reason = os.strerror(error.errno or errno.EIO)
                raise GuestMemoryFaultError(gpa, len(buffer), f"in its file: {reason}") from error
            if not count:
                raise GuestMemoryFaultError(gpa, len(buffer), "its file is too short")
            offset += count
            buffer = buffer[count:]

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return where there may be something else than zeros."""
        part, start = self._place(gpa, size)
        end = start + size
        found: list[tuple[int, int]] = []
        position = start
        while position < end:
            try:
                low = os.lseek(part.descriptor, position, os.SEEK_DATA)
                high = os.lseek(part.descriptor, low, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                    return found
                return [(gpa, gpa + size)]
            if low >= end:
                break
            found.append((gpa + low - start, gpa + min(high, end) - start))
            position = high
        return found

    def close(self) -> None:
        """Give back the files."""
        for part in self._parts:
            with contextlib.suppress(OSError):
                os.close(part.descriptor)
        self._parts = []

    def _place(self, gpa: int, size: int) -> tuple[FilePart, int]:
        index = bisect_right(self._starts, gpa) - 1
        if index < 0 or gpa + size > self._blocks[index].end or not self._parts:
            raise GuestMemoryFaultError(gpa, size, "it is in no file")
        part = self._parts[index]
        return part, part.offset + gpa - self._starts[index]


@contextmanager
def _open(context: SourceContext) -> Iterator[GuestMemory]:
    parts: dict[RamBlock, FilePart] = {}
    missing = []
    reasons: list[str] = []
    try:
        located = _located(context, reasons)
        for block in context.ram_blocks:
            try:
                if block in located:
                    parts[block] = _open_mapped(*located[block])
                else:
                    parts[block] = _open_named(context.monitor, block)
            except SourceError as error:
                missing.append(block)
                reasons.append(str(error))
    except BaseException:
        BackingFileMemory(parts, missing).close()
        raise
    if not parts:
        raise SourceError("; ".join(dict.fromkeys(reasons)))
    memory = BackingFileMemory(parts, missing)
    try:
        yield memory
    finally:
        memory.close()


def _located(
    context: SourceContext, reasons: list[str]
) -> dict[RamBlock, tuple[int, list[HostSegment]]]:
    try:
        pid = context.pid or find_qemu_process(context.addresses)
        located = locate_blocks(context, pid)
    except SourceError as error:
        reasons.append(str(error))
        return {}
    return {block: (pid, segments) for block, segments in located.items()}


def _open_mapped(pid: int, segments: Sequence[HostSegment]) -> FilePart:
    first = segments[0].mapping
    if any(not part.mapping.shared or not part.mapping.inode for part in segments):
        raise SourceError("guest memory is in no shared file: no memory-backend with share=on")
    start = first.offset + segments[0].hva - first.start
    for part in segments:
        offset = part.mapping.offset + part.hva - part.mapping.start
        if part.mapping.inode != first.inode or offset - start != part.gpa - segments[0].gpa:
            raise SourceError(f"a RAM block is in several places of {first.path}")
    return FilePart(_open_same_file(pid, first), start)


def _open_same_file(pid: int, mapping: MemoryMapping) -> int:
    process = Path(f"/proc/{pid}")
    candidates = [
        process / "map_files" / f"{mapping.start:x}-{mapping.end:x}",
        Path(f"{process}/root{mapping.path}"),
    ]
    with contextlib.suppress(OSError):
        candidates += (process / "fd").iterdir()
    reason = "it is not there"
    for path in candidates:
        try:
            status = path.stat()
            if status.st_ino != mapping.inode or not stat.S_ISREG(status.st_mode):
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            continue
        if os.fstat(descriptor).st_ino == mapping.inode:
            return descriptor
        os.close(descriptor)
    raise SourceError(f"cannot open {mapping.path} of QEMU's process {pid}: {reason}")


def _open_named(monitor: Monitor, block: RamBlock) -> FilePart:
    identifier = block.name.removeprefix("/objects/")
    if not identifier or not all(part.isalnum() or part in "-._" for part in identifier):
        raise SourceError(f"RAM block {block.name} is of no memory backend")
    shared = _property(monitor, identifier, "share")
    path = _property(monitor, identifier, "mem-path")
    if shared is not True or not isinstance(path, str):
        raise SourceError(f"RAM block {block.name} is in no shared file")
    offset = _property(monitor, identifier, "offset")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"cannot open {path}: {os.strerror(error.errno or 0)}") from error
    base = offset if isinstance(offset, int) else 0
    part = FilePart(descriptor, base + block.region_offset)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size < part.offset + block.size:
        os.close(descriptor)
        raise SourceError(f"{path} is too small for RAM block {block.name}: it is another file")
    return part


def _property(monitor: Monitor, identifier: str, name: str) -> object:
    answer = monitor.execute(f"qom-get /objects/{identifier} {name}")
    try:
        value: object = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return value


SOURCE = MemorySource("backing_file", 10, _open)
