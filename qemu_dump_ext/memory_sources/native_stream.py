"""Memory in QEMU's own ELF dump, which QEMU writes into memory of ours, piece by piece.

Needs nothing but a QMP socket that passes descriptors (a unix socket, but no common file system,
process or user), and a target that QEMU can dump. Each piece is a dump of its range.

QEMU announces the end of every dump to all clients of QMP (DUMP_COMPLETED): it is not asked where
libvirt is one of them. `query-dump` tells of the last one.

Source: QEMU dump/dump.c qmp_dump_guest_memory(), create_vmcore(); monitor/fds.c.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.access import SourceContext
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.memory_sources._declaration import MemorySource
from qemu_dump_ext.memory_sources._pieces import FILE_COUNT, FilePlace, PiecewiseMemory
from qemu_dump_ext.qemu.native_dump import NativeDumps
from qemu_dump_ext.structures.elf import PT_LOAD, parse_elf_head

_HEAD_SIZE = 1 << 20
"""Bytes; headers and the notes of some hundred vCPUs. More is allocated when it is written."""
_PHDRS_END = 4096
"""Bytes; the program headers of one range are before that."""


class DumpedPieces:
    """Has QEMU dump ranges."""

    is_async = True
    piece_size = 32 << 20  # QEMU takes some 10 ms for them, and 2 ms for none

    def __init__(self, native: NativeDumps) -> None:
        self._native = native
        self._files: list[int] = []
        try:
            with refused_as(SourceError, "get memory for QEMU to dump into"):
                for _ in range(FILE_COUNT):
                    self._files.append(os.memfd_create("qemu-dump-piece"))
                    # By us, so that it does not count as memory of QEMU's, which may be allowed
                    # little.
                    os.posix_fallocate(self._files[-1], 0, _HEAD_SIZE + self.piece_size)
        except SourceError:
            self.close()
            raise

    def begin(self, file: int, gpa: int, size: int) -> Callable[[], FilePlace]:
        """Ask for a range."""
        descriptor = self._files[file]
        os.lseek(descriptor, 0, os.SEEK_SET)  # QEMU writes from here on
        wait = self._native.begin_into(descriptor, gpa, size)

        def place() -> FilePlace:
            wait()
            offset = _offset_of_range(os.pread(descriptor, _PHDRS_END, 0), gpa, size)
            if os.lseek(descriptor, 0, os.SEEK_CUR) < offset + size:
                raise SourceError(f"QEMU's dump of {size:#x} bytes at {gpa:#x} is cut")
            return FilePlace(descriptor, offset)

        return place

    def close(self) -> None:
        """Give back the files."""
        while self._files:
            os.close(self._files.pop())


def _offset_of_range(content: bytes, gpa: int, size: int) -> int:
    """Return where guest memory is in a dump that begins with `content`."""
    head = parse_elf_head(content)
    count = head.header["e_phnum"]
    load = head.header["e_phoff"] + head.phdr.size
    if count != 2 or load + head.phdr.size > len(content):  # PT_NOTE and one PT_LOAD
        raise SourceError(f"QEMU's dump of one range has {count} program headers")
    segment = head.phdr.unpack_integers(content, load)
    expected = PT_LOAD, gpa, size
    if (segment["p_type"], segment["p_paddr"], segment["p_filesz"]) != expected:
        raise SourceError("QEMU's dump is of another range than it was asked for")
    return segment["p_offset"]


@contextmanager
def _open(context: SourceContext) -> Iterator[GuestMemory]:
    native = NativeDumps(context.monitor, context.qmp, context.dumps_forbidden)
    native.require_descriptors()
    memory = PiecewiseMemory("native_stream", context.ram_blocks, DumpedPieces(native))
    try:
        yield memory
    finally:
        memory.close()


SOURCE = MemorySource("native_stream", 25, _open)
