"""What the host may refuse at any time: threads, processes, descriptors, memory, room.

Where less of it does the same work more slowly, less is taken; where not, it is an error of ours.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, ParamSpec, Self, TypeVar

from qemu_dump_ext.errors import DumpError, SourceError
from qemu_dump_ext.interrupts import leave_signals_to_main_thread, uninterrupted

ParametersT = ParamSpec("ParametersT")
ResultT = TypeVar("ResultT")

_ROOM = 32 << 20
"""Bytes that what is small takes, from the first module to the last word: with less, anything may
fail anywhere, and libraries hang or abort then."""
_STACK_MAX = 8 << 20
"""Bytes of the stack of a thread, unless the host gives it more."""


@contextmanager
def refused_as(failure: type[DumpError], what: str) -> Iterator[None]:
    """Turn a refusal of the host, while `what` is done, into `cannot WHAT: REASON`.

    Raises:
        DumpError: Of the type `failure`.
    """
    try:
        yield
    except OSError as error:
        raise failure(f"cannot {what}: {os.strerror(error.errno or errno.EIO)}") from error


def require_room() -> None:
    """Make sure that memory is left for all that is small.

    Where memory is hardly enough, a large piece of it is refused then, in a thread that can say so,
    and not a small one in the middle of something.

    Raises:
        SourceError: It is not.
    """
    if not _has_room(0):
        raise SourceError("this host refuses what is needed: no memory left")


def _has_room(size: int) -> bool:
    """Tell whether so many bytes are left, besides what all takes that is small."""
    try:
        mmap.mmap(-1, size + _ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True


def private_memory(size: int) -> memoryview:
    """Return memory that no other process shares, for `size` bytes, which are zero.

    In large pages where the host has some: a disk takes a third less time for what is in them.
    """
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        area.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(area)


def start_thread(thread: threading.Thread) -> bool:
    """Start a thread; returns False where the host does not allow one more."""
    # Python waits for ever for a thread that has no memory to begin.
    if not _has_room(_STACK_MAX):
        return False
    try:
        thread.start()
    except RuntimeError:  # which is all that Python says of it
        return False
    return True


def start_needed_thread(
    thread: threading.Thread, failure: type[DumpError], *, what: str = "a thread"
) -> None:
    """Start a thread without which nothing can be done.

    Args:
        thread: To be started.
        failure: What is raised otherwise.
        what: It is called in the message.

    Raises:
        DumpError: Of the type `failure`: the host does not allow one more.
    """
    if not start_thread(thread):
        raise failure(
            f"cannot start {what}: the host allows no more",
            hint="see 'ulimit -u' and 'ulimit -v'",
        )


class Job(Generic[ResultT]):
    """Work that is done in another thread, and then its result.

    `concurrent.futures` has the same, and takes a twentieth of a small dump to import.
    """

    def __init__(self, work: Callable[[], ResultT]) -> None:
        self._work: Callable[[], ResultT] | None = work
        self._results: list[ResultT] = []
        self._error: BaseException | None = None
        self._taken = threading.Lock()
        self._ended = threading.Lock()
        self._ended.acquire()

    def run(self) -> None:
        """Do it, unless it was given up."""
        try:
            if (work := self._take()) is None:
                return
            self._results.append(work())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            self._error = error
        self._ended.release()

    def _take(self) -> Callable[[], ResultT] | None:
        with self._taken:
            work, self._work = self._work, None
        return work

    def give_up(self) -> None:
        """Do not begin; work that has begun goes on."""
        self._take()

    def is_done(self) -> bool:
        """Tell whether `result` does not wait."""
        return not self._ended.locked()

    def error(self) -> BaseException | None:
        """Return what the work raised, when it has ended; not if given up."""
        self._ended.acquire()
        self._ended.release()
        return self._error

    def result(self) -> ResultT:
        """Return the result when it is there, or raise what the work raised; not if given up."""
        if (error := self.error()) is not None:
            raise error
        return self._results[0]


class WorkerThreads:
    """As many threads as are wanted, or as the host allows; without any, the caller does the work.

    Use as a context manager. Signals reach the main thread alone.
    """

    def __init__(self, count: int, name: str) -> None:
        """Start `count` threads."""
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        for number in range(count):
            thread = threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True)
            with uninterrupted():
                if not start_thread(thread):
                    break
                self._threads.append(thread)

    def _work(self) -> None:
        with suppress(MemoryError):  # a thread that ends would leave the others' work undone
            leave_signals_to_main_thread()
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # not to be kept until the next one comes

    def submit(
        self,
        work: Callable[ParametersT, ResultT],
        *arguments: ParametersT.args,
        **options: ParametersT.kwargs,
    ) -> Job[ResultT]:
        """Have `work` done; its result, or what it raises, is in what is returned."""
        job = Job(partial(work, *arguments, **options))
        if self._threads:
            self._jobs.put(job)
        else:
            job.run()
        return job

    def close(self) -> None:
        """Wait until all work is done; harmless when repeated."""
        for _ in self._threads:
            self._jobs.put(None)
        while self._threads:
            self._threads[-1].join()
            self._threads.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
