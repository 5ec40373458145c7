"""Memory in the address space of QEMU's process, on the same host.

QEMU's monitor tells where each RAM block is (`gpa2hva`). Pages that QEMU never touched are known
from the page map and not read: reading them would make QEMU's page tables grow.

process_vm_readv() copies straight from page to page, four times as fast as /proc/PID/mem, which
goes through a page of the kernel's; the latter stays where a seccomp filter forbids the former.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from qemu_dump_ext.errors import GuestMemoryFaultError, SourceError
from qemu_dump_ext.guest.access import SourceContext
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.memory_sources._declaration import MemorySource
from qemu_dump_ext.memory_sources._page_map import PageMap
from qemu_dump_ext.qemu.monitor_text import parse_host_address
from qemu_dump_ext.qemu.process import MemoryMapping, find_qemu_process, read_mappings, refusal
from qemu_dump_ext.value import Value

_PAGE = mmap.PAGESIZE


class HostSegment(Value):
    """A part of a RAM block that lies in one mapping of QEMU's process.

    Attributes:
        gpa: First guest physical address.
        end: First guest physical address behind it.
        hva: QEMU's address of `gpa`.
        mapping: Where it lies.
    """

    gpa: int
    end: int
    hva: int
    mapping: MemoryMapping


def locate_blocks(context: SourceContext, pid: int) -> dict[RamBlock, list[HostSegment]]:
    """Find the RAM blocks of a guest in the address space of QEMU's process.

    Raises:
        SourceError: The monitor does not tell, or the process has no such memory.
    """
    mappings = read_mappings(pid)
    addresses = host_addresses(context)
    return {block: _segments(mappings, block, hva) for block, hva in addresses.items()}


def host_addresses(context: SourceContext) -> dict[RamBlock, int]:
    """Return where QEMU's process has the first byte of each RAM block of a guest.

    Raises:
        SourceError: The monitor does not tell, or a block is in several places.
    """
    addresses = {}
    ends = [
        (block.gpa, max(block.gpa, (block.end - 1) // _PAGE * _PAGE))
        for block in context.ram_blocks
    ]
    known = _host_addresses(context, [gpa for pair in ends for gpa in pair])
    for block, (first, last) in zip(context.ram_blocks, ends, strict=True):
        hva = known[first]
        if known[last] - hva != last - first:
            raise SourceError(f"RAM block {block.name} is not contiguous in QEMU's address space")
        addresses[block] = hva
    return addresses


@contextmanager
def open_located(pid: int, addresses: Mapping[RamBlock, int]) -> Iterator[ProcessMemory]:
    """Open memory of which it is known where it is, for the time of a `with` block.

    Args:
        pid: Of QEMU's process.
        addresses: Where that has the first byte of each RAM block; by ascending gpa.

    Raises:
        SourceError: It has no memory there, or must not be looked at.
    """
    mappings = read_mappings(pid)
    segments = [
        part for block, hva in addresses.items() for part in _segments(mappings, block, hva)
    ]
    memory = ProcessMemory(pid, segments)
    try:
        memory.read_into(segments[0].gpa, memoryview(bytearray(1)))
        yield memory
    finally:
        memory.close()


def _host_addresses(context: SourceContext, gpas: Sequence[int]) -> dict[int, int]:
    answers = context.still.ask([f"gpa2hva {gpa:#x}" for gpa in gpas])
    return {gpa: parse_host_address(text, gpa) for gpa, text in zip(gpas, answers, strict=True)}


def _segments(mappings: Sequence[MemoryMapping], block: RamBlock, hva: int) -> list[HostSegment]:
    segments = []
    position = hva
    for mapping in mappings:
        if mapping.start <= position < mapping.end:
            end = min(mapping.end, hva + block.size)
            gpa = block.gpa + position - hva
            segments.append(HostSegment(gpa, gpa + end - position, position, mapping))
            position = end
            if position == hva + block.size:
                return segments
    raise SourceError(
        f"RAM block {block.name} is not where QEMU says in process"
        " memory: it is another QEMU's process, or not QEMU's"
    )


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class ProcessMemory:
    """Guest memory in QEMU's process."""

    name = "process"
    is_slow = False
    is_at_hand = True

    def __init__(self, pid: int, segments: Sequence[HostSegment]) -> None:
        """Prepare to read `segments`, which go by ascending gpa."""
        self._pid = pid
        self._segments = segments
        self._starts = [segment.gpa for segment in segments]
        self._descriptor = -1
        self._page_map = PageMap(pid)
        self._call = ctypes.CDLL(None, use_errno=True).process_vm_readv
        self._call.restype = ctypes.c_ssize_t
        pointer = ctypes.POINTER(_Iovec)
        count = ctypes.c_ulong
        self._call.argtypes = (ctypes.c_int, pointer, count, pointer, count, count)

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        """Fill `buffer` from `gpa` on."""
        while buffer:
            segment = self._segment_of(gpa)
            size = min(len(buffer), segment.end - gpa)
            self._read(gpa, segment.hva + gpa - segment.gpa, buffer[:size])
            gpa += size
            buffer = buffer[size:]

    def populated(self, gpa: int, size: int) -> Sequence[tuple[int, int]]:
        """Return where there may be something else than zeros."""
        found: list[tuple[int, int]] = []
        end = gpa + size
        while gpa < end:
            segment = self._segment_of(gpa)
            stop = min(end, segment.end)
            if segment.mapping.is_private_anonymous:
                shift = segment.hva - segment.gpa
                first = (gpa + shift) // _PAGE * _PAGE
                last = -(-(stop + shift) // _PAGE) * _PAGE
                found += [
                    (max(low - shift, gpa), min(high - shift, stop))
                    for low, high in self._page_map.stored(first, last)
                ]
            else:  # what QEMU has not touched of a file may be there all the same
                found.append((gpa, stop))
            gpa = stop
        return found

    def close(self) -> None:
        """Give back what is held."""
        self._page_map.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _segment_of(self, gpa: int) -> HostSegment:
        index = bisect_right(self._starts, gpa) - 1
        if index < 0 or gpa >= self._segments[index].end:
            raise GuestMemoryFaultError(gpa, 1, "no RAM block is there")
        return self._segments[index]

    def _read(self, gpa: int, hva: int, buffer: memoryview) -> None:
        size = len(buffer)
        try:
            while buffer:
                count = self._read_some(hva, buffer)
                if not count:
                    raise GuestMemoryFaultError(gpa, size, "QEMU's process gives nothing there")
                hva += count
                buffer = buffer[count:]
        except PermissionError as error:
            raise refusal(self._pid, error) from error
        except ProcessLookupError as error:
            raise SourceError("the guest is gone: QEMU's process has ended") from error
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            raise GuestMemoryFaultError(gpa, size, f"in QEMU's process: {reason}") from error

    def _read_some(self, hva: int, buffer: memoryview) -> int:
        if self._descriptor >= 0:
            return os.preadv(self._descriptor, [buffer], hva)
        local = _Iovec(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), len(buffer))
        remote = _Iovec(hva, len(buffer))
        count = int(self._call(self._pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0))
        if count >= 0:
            return count
        number = ctypes.get_errno()
        if number not in {errno.EPERM, errno.ENOSYS}:
            raise OSError(number, os.strerror(number))
        self._descriptor = os.open(f"/proc/{self._pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        return os.preadv(self._descriptor, [buffer], hva)


@contextmanager
def _open(context: SourceContext) -> Iterator[GuestMemory]:
    pid = context.pid or find_qemu_process(context.addresses)
    located = locate_blocks(context, pid)
    memory = ProcessMemory(pid, [part for block in located.values() for part in block])
    try:
        yield memory
    finally:
        memory.close()


SOURCE = MemorySource("process", 20, _open)
