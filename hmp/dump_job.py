"""The proxy's dumps: one at a time, in a thread, through the connection that everybody shares."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.errors import DumpError, DumpWriteError, SourceError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter

from .dump_target import DumpTarget, in_words_of_qemu, opened
from .upstream.by_libvirt import LibvirtUpstream
from .upstream.by_qmp import QmpUpstream
from .upstream.upstream import Event, Upstream

IN_PROCESS = "There is a dump in process, please wait."
_MONITOR_SECONDS = 120.0

ResultT = TypeVar("ResultT")


def _ignore(_event: Event) -> None:
    pass


class DumpCancelledError(DumpError):
    """Somebody does not want the dump any more."""


class _Meter(ProgressMeter):
    # Counts, and is where a dump can be cancelled: between two pieces of guest memory.
    def __init__(self, job: DumpJob) -> None:
        super().__init__(None)
        self._job = job
        job.meter = self

    def start(self, total: int) -> None:
        super().start(total)
        self._job.begin(total)

    def advance(self, size: int) -> None:
        super().advance(size)
        self._job.completed += size
        self._job.check_cancelled()


class _ThreadMonitor:
    """The human monitor for the engine, which blocks in its thread."""

    def __init__(self, job: DumpJob, upstream: Upstream) -> None:
        self._job = job
        self._upstream = upstream
        self.address = upstream.address

    def execute(self, command: str) -> str:
        """Return the answer with plain line ends."""
        return self.begin(command)()

    def begin(self, command: str) -> Callable[[], str]:
        """Have a command executed; what is returned waits for its answer."""
        if command.startswith("pmemsave"):
            self._job.check_cancelled()
        answer = self._job.begin_work(self._upstream.execute_hmp(command), command)
        return lambda: answer().replace("\r\n", "\n")


class _ThreadQmp(_ThreadMonitor):
    """QMP for the engine, and the human monitor through it, likewise."""

    def __init__(self, job: DumpJob, upstream: QmpUpstream) -> None:
        super().__init__(job, upstream)
        self._qmp = upstream
        self.passes_descriptors = upstream.passes_descriptors

    def begin_qmp(
        self, command: str, arguments: dict[str, object] | None = None
    ) -> Callable[[], Any]:
        """Have a QMP command executed; what is returned waits for what it returns."""
        return self._job.begin_work(self._qmp.call(command, arguments), command)

    @contextmanager
    def listening(self, hear: Callable[[Event], None]) -> Iterator[None]:
        """Have `hear` called with each event, in the loop's thread, inside the block."""
        self._job.hear = hear
        try:
            yield
        finally:
            self._job.hear = _ignore

    def hand_over(self, descriptor: int, name: str) -> None:
        """Give QEMU a descriptor."""
        self._job.wait_for(self._qmp.hand_over(descriptor, name), "getfd")


class DumpJob:
    """One dump.

    Attributes:
        total: Bytes of guest memory in it; 0 until that is known.
        completed: Bytes of them that are done.
        begun: Done when nothing can be refused any more, or when the dump has ended.
        finished: The report, or the error.
        stopped_guest: The guest ran before.
        is_open: The target is; QEMU, too, calls only what fails from then on a failed dump.
        has_begun: Nothing can be refused any more.
        copies: The guest runs again before the dump is complete.
        hear: Gets QEMU's events while the guest stands still for the dump.
        meter: Knows the rate.
    """

    def __init__(self, upstream: Upstream) -> None:
        self.total = self.completed = 0
        self.meter = ProgressMeter(None)
        self._upstream = upstream
        self._loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = self._loop.create_future()
        self.finished: asyncio.Future[DumpReport] = self._loop.create_future()
        self._cancelled = threading.Event()
        self.is_open = self.copies = False
        self.stopped_guest = False
        self.has_begun = False
        self.hear: Callable[[Event], None] = _ignore

    def cancel(self) -> None:
        """Have it end soon, and leave nothing behind."""
        self._cancelled.set()

    def progress_line(self, now: float) -> str:
        """Say how far it is."""
        return self.meter.line(now)

    def check_cancelled(self) -> None:
        """Raise DumpCancelledError if it was cancelled."""
        if self._cancelled.is_set():
            raise DumpCancelledError("dump: cancelled")

    def begin(self, total: int) -> None:
        """Know the size; called in the dump's thread."""
        self.total = total
        self.has_begun = True
        self._loop.call_soon_threadsafe(self._set_begun)
        self.check_cancelled()

    def wait_for(self, work: Coroutine[Any, Any, ResultT], what: str) -> ResultT:
        """Run `work` in the loop and wait for it in this thread.

        Raises:
            SourceError: QEMU does not answer.
        """
        return self.begin_work(work, what)()

    def begin_work(self, work: Coroutine[Any, Any, ResultT], what: str) -> Callable[[], ResultT]:
        """Run `work` in the loop; what is returned waits for it in this thread."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)

        def wait() -> ResultT:
            try:
                return future.result(_MONITOR_SECONDS)
            except TimeoutError as error:
                future.cancel()
                raise SourceError(
                    f"QEMU does not answer {what.split(maxsplit=1)[0]} in {_MONITOR_SECONDS:.0f} s"
                ) from error

        return wait

    def run(self, request: DumpRequest, target: DumpTarget, memory: str) -> DumpReport:
        """Take the dump, in a thread; one that QEMU itself refuses is not as QEMU would write it.

        Raises:
            DumpError: With what QEMU would say, where QEMU would say it.
        """
        version = self._upstream.version
        with opened(target, version, request) as sink:
            self.is_open = True
            try:
                return dump(
                    request,
                    self._access(),
                    sink,
                    memory=memory,
                    progress=_Meter(self),
                    mend_refused=True,
                )
            except DumpWriteError as error:
                raise in_words_of_qemu(error, sink, request) from error

    def _access(self) -> GuestAccess:
        if isinstance(self._upstream, LibvirtUpstream):
            return GuestAccess.by_manager(self._upstream.require_monitor())
        if isinstance(self._upstream, QmpUpstream):
            return GuestAccess.by_qmp(_ThreadQmp(self, self._upstream))
        monitor = _ThreadMonitor(self, self._upstream)
        return GuestAccess.by_hmp(monitor, pid=self._upstream.pid)

    def end(self, report: DumpReport | None, error: DumpError | None) -> None:
        """Be over."""
        self._set_begun()
        if error is not None:
            self.finished.set_exception(error)
            self.finished.exception()  # it is also asked for by whoever started the dump
        elif report is not None:
            self.finished.set_result(report)

    def _set_begun(self) -> None:
        if not self.begun.done():
            self.begun.set_result(None)
