"""Move guest memory in large pieces: one reader, workers, results in order.

The caller's thread reads (inside gdb, only that thread may touch the guest) and consumes; the
workers run what releases the interpreter lock, such as compression. Memory is bounded by the
number of buffers, whatever the guest's size, and the result does not depend on the workers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from qemu_dump_ext.guest import GuestMemory, RamBlock
from qemu_dump_ext.interrupts import leave_signals_to_main_thread, uninterrupted

PIECE_SIZE = 4 << 20
"""Bytes of guest memory that are read, compressed and written at a time."""

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Extent:
    """Guest memory that lands at one place of a piece.

    Attributes:
        gpa: First guest physical address.
        size: In bytes.
        offset: In the piece's buffer, in bytes.
    """

    gpa: int
    size: int
    offset: int


@dataclass(frozen=True)
class Piece:
    """What is read into one buffer; bytes that no extent covers are zero.

    Attributes:
        size: Of the buffer's used part, in bytes.
        extents: By ascending offset.
    """

    size: int
    extents: tuple[Extent, ...]


def pieces_of_blocks(blocks: Iterable[RamBlock]) -> Iterator[Piece]:
    """Cut every block into pieces, regardless of pages."""
    for block in blocks:
        for gpa in range(block.gpa, block.end, PIECE_SIZE):
            size = min(PIECE_SIZE, block.end - gpa)
            yield Piece(size, (Extent(gpa, size, 0),))


def worker_count() -> int:
    """Return how many threads compress: the CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def read_through(
    memory: GuestMemory,
    pieces: Iterable[Piece],
    work: Callable[[memoryview], ResultT],
    consume: Callable[[ResultT], None],
    progress: Callable[[int], None],
) -> None:
    """Read every piece, run `work` on it in a worker, and `consume` the results in order.

    Args:
        memory: Read in this thread only.
        pieces: In the order of the dump.
        work: Gets the filled buffer; it may return parts of it, which are consumed before the
            buffer is used again.
        consume: Runs in this thread.
        progress: Gets the bytes of each piece that has been consumed.
    """
    workers = worker_count()
    depth = 2 * workers
    free = [bytearray(PIECE_SIZE) for _ in range(depth)]
    pending: deque[tuple[Future[ResultT], bytearray, int]] = deque()

    def consume_oldest() -> None:
        future, buffer, size = pending.popleft()
        with uninterrupted():  # in a future, an interrupt would leave its locks taken
            result = future.result()
        consume(result)
        free.append(buffer)
        progress(size)

    with ThreadPoolExecutor(
        workers, thread_name_prefix="page", initializer=leave_signals_to_main_thread
    ) as pool:
        try:
            for piece in pieces:
                if not free:
                    consume_oldest()
                buffer = free.pop()
                view = memoryview(buffer)[: piece.size]
                _fill(memory, piece, view)
                with uninterrupted():
                    pending.append((pool.submit(work, view), buffer, piece.size))
            while pending:
                consume_oldest()
        except BaseException:
            with uninterrupted():
                for future, _, _ in pending:
                    future.cancel()
            raise


def _fill(memory: GuestMemory, piece: Piece, view: memoryview) -> None:
    end = 0
    for extent in piece.extents:
        if extent.offset > end:
            view[end : extent.offset] = bytes(extent.offset - end)
        end = extent.offset + extent.size
        memory.read_into(extent.gpa, view[extent.offset : end])
    if end < piece.size:
        view[end : piece.size] = bytes(piece.size - end)
