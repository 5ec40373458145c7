"""Move guest memory in large pieces: one reader, workers, results in order.

The caller's thread reads (inside gdb, only that thread may touch the guest) and consumes; the
workers run what releases the interpreter lock, such as compression. Memory is bounded by the
number of buffers, whatever the guest's size, and the result does not depend on the workers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

from qemu_dump_ext.guest.memory import GuestMemory, is_sparse
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.host_limits import Job, WorkerThreads, private_memory, require_room
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.value import Value

PIECE_SIZE = 4 << 20
"""Bytes of guest memory that are read, compressed and written at a time."""
_SLOW_PIECE_SIZE = 256 << 10
"""The same where memory is read slowly, so that progress is seen, and an interrupt is soon."""
ZERO_PIECE_SIZE = 1 << 30
"""Bytes of guest memory known to be zero that are handled at a time."""
_HOLE_SIZE = 1 << 20
"""Fewer bytes known to be zero are filled with zeros in a buffer that has other content."""
_QUESTION_SIZE = 16 << 30
"""Bytes of guest memory for which a source is asked at a time where it is populated."""
_QUESTIONS_MAX = 1024
"""Of one RAM block: a dump file may claim more memory than could be asked for in such parts."""

ResultT = TypeVar("ResultT")


class Extent(Value):
    """Guest memory that lands at one place of a piece.

    Attributes:
        gpa: First guest physical address.
        size: In bytes.
        offset: In the piece's buffer, in bytes.
    """

    gpa: int
    size: int
    offset: int


class Piece(Value):
    """Guest memory that is handled at a time; bytes that no extent covers are zero.

    Attributes:
        gpa: First guest physical address.
        size: In bytes; up to PIECE_SIZE, or with no extents up to ZERO_PIECE_SIZE.
        extents: By ascending offset; none: the piece is known to be zero and is not read.
    """

    gpa: int
    size: int
    extents: tuple[Extent, ...]


class Buffer(Value):
    """Room for a piece.

    Attributes:
        view: Of the room.
        offset: Of the room in a memory that several buffers share, in bytes.
    """

    view: memoryview
    offset: int = 0


class PieceWork(Value, Generic[ResultT]):
    """What is done with pieces.

    Attributes:
        pack: Runs in a worker. Gets a piece and its filled buffer, which it may change; it may
            return parts of the buffer, which are consumed before the buffer is used again.
        zeros: Runs in the caller's thread. Gets a piece that is known to be zero.
        consume: Runs in the caller's thread, in the order of the pieces.
        prepare: Likewise, behind the reading of a piece that is read; it may change the buffer.
    """

    pack: Callable[[Piece, Buffer], ResultT]
    zeros: Callable[[Piece], ResultT]
    consume: Callable[[ResultT], None]
    prepare: Callable[[Piece, Buffer], None] | None = None


def populated_ranges(memory: GuestMemory, gpa: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where guest memory from `gpa` to `end`, in one RAM block, may not be zero."""
    if not is_sparse(memory):
        yield gpa, end
        return
    size = max(_QUESTION_SIZE, -(-(end - gpa) // _QUESTIONS_MAX))
    for start in range(gpa, end, size):
        yield from memory.populated(start, min(size, end - start))


def piece_size(memory: GuestMemory) -> int:
    """Return how many bytes of `memory` are handled at a time: PIECE_SIZE at most."""
    return _SLOW_PIECE_SIZE if memory.is_slow else PIECE_SIZE


def cut(
    memory: GuestMemory, blocks: Iterable[RamBlock], start: int, end: int, page_size: int
) -> Iterator[Piece]:
    """Cut guest memory into pieces; every piece begins at a page, counted from `start`.

    Args:
        memory: Tells where it is populated.
        blocks: What there is between `start` and `end`, by ascending gpa.
        start: First guest physical address.
        end: First one behind the last piece.
        page_size: In bytes.
    """
    position = start
    extents: list[Extent] = []
    most = max(1, piece_size(memory) // page_size) * page_size

    def piece(stop: int) -> Piece:
        nonlocal position, extents
        made = Piece(position, stop - position, tuple(extents))
        position, extents = stop, []
        return made

    def zeros(stop: int) -> Iterator[Piece]:
        while position < stop:
            yield piece(min(position + ZERO_PIECE_SIZE, stop))

    filled = start  # the first page behind what `extents` has
    for block in blocks:
        for low, high in populated_ranges(memory, block.gpa, block.end):
            gpa = low
            while gpa < high:
                first = start + (gpa - start) // page_size * page_size
                if extents and first - filled >= _HOLE_SIZE:
                    yield piece(filled)
                if not extents and first - position >= _HOLE_SIZE:
                    yield from zeros(first)
                limit = position + most
                if gpa >= limit:
                    yield piece(limit)
                    continue
                stop = min(high, limit)
                extents.append(Extent(gpa, stop - gpa, gpa - position))
                gpa = stop
                filled = min(start + -(-(stop - start) // page_size) * page_size, end)
                if filled - position >= most:
                    yield piece(filled)
    if extents:
        yield piece(filled)
    yield from zeros(end)


def worker_count() -> int:
    """Return how many threads compress by default: the CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def buffer_count(workers: int) -> int:
    """Return how many buffers keep this many workers busy."""
    return 2 * workers + 1


def read_through(
    memory: GuestMemory,
    pieces: Iterable[Piece],
    work: PieceWork[ResultT],
    progress: Callable[[int], None],
    *,
    threads: int | None = None,
    buffers: Sequence[Buffer] = (),
) -> None:
    """Read every piece, run `work` on it in a worker, and consume the results in order.

    Args:
        memory: Read in this thread only.
        pieces: In the order of the dump.
        work: What to do.
        progress: Gets the bytes of each piece that has been consumed.
        threads: Number of workers; None: `worker_count`.
        buffers: Of PIECE_SIZE; none: memory of this process.
    """
    workers = threads or worker_count()
    free = list(buffers)
    if not free:
        free = [Buffer(private_memory(PIECE_SIZE)) for _ in range(buffer_count(workers))]
        require_room()
    most_pending = 4 * len(free)
    pending: deque[tuple[Job[ResultT], Buffer | None, int]] = deque()

    def consume_oldest() -> None:
        job, buffer, size = pending.popleft()
        with uninterrupted():
            result = job.result()
        work.consume(result)
        if buffer is not None:
            free.append(buffer)
        progress(size)

    with WorkerThreads(workers, "page") as pool:
        try:
            for piece in pieces:
                while pending and (
                    pending[0][0].is_done() or not free or len(pending) >= most_pending
                ):
                    consume_oldest()
                if not piece.extents:
                    known = Job(partial(work.zeros, piece))
                    known.run()
                    pending.append((known, None, piece.size))
                    continue
                buffer = free.pop()
                filled = replace(buffer, view=buffer.view[: piece.size])
                _fill(memory, piece, filled.view)
                if work.prepare is not None:
                    work.prepare(piece, filled)
                with uninterrupted():
                    job = pool.submit(work.pack, piece, filled)
                pending.append((job, buffer, piece.size))
            while pending:
                consume_oldest()
        except BaseException:
            with uninterrupted():
                for job, _, _ in pending:
                    job.give_up()
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
