"""The proxy's dumps: one at a time, in a thread, through the connection that everybody shares."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from proxy_qmp_upstream import QmpUpstream
from proxy_upstream import Event, Upstream

from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.errors import (
    DumpError,
    DumpWriteError,
    NotDumpedByQemuError,
    RequestError,
    SourceError,
    UnsupportedTargetError,
)
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.native_dump import dump_byte_through_descriptor, dump_byte_through_file
from qemu_dump_ext.sinks import open_sink
from qemu_dump_ext.sinks._sink import Sink
from qemu_dump_ext.structures.dialect import QemuVersion

IN_PROCESS = "There is a dump in process, please wait."
NOT_IN_PROCESS = "There is no dump in process."
_CREATE_SINCE: QemuVersion = (8, 0, 0)  # `Could not create`; 7.2 says open, 11.1 create
_MONITOR_SECONDS = 120.0

ResultT = TypeVar("ResultT")


class DumpCancelledError(DumpError):
    """Somebody does not want the dump any more."""


class DumpStatus(enum.Enum):
    """QMP's DumpStatus."""

    NONE = "none"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True)
class DumpTarget:
    """Where a dump goes.

    Attributes:
        name: As the client wrote it.
        path: Absolute; or None for a descriptor.
        descriptor: Ours to close; or None for a path.
    """

    name: str
    path: Path | None
    descriptor: int | None = None


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

    def execute(self, command: str) -> str:
        """Return the answer with plain line ends."""
        return self.begin(command)()

    def begin(self, command: str) -> Callable[[], str]:
        """Have a command executed; what is returned waits for its answer."""
        if command.startswith("pmemsave"):
            self._job.check_cancelled()
        answer = self._job.begin_work(self._upstream.execute_hmp(command), command)
        return lambda: answer().replace("\r\n", "\n")


class _ThreadQmp:
    """QMP for the engine, likewise."""

    def __init__(self, job: DumpJob, upstream: QmpUpstream) -> None:
        self._job = job
        self._upstream = upstream

    def begin_qmp(
        self, command: str, arguments: dict[str, object] | None = None
    ) -> Callable[[], Any]:
        """Have a QMP command executed; what is returned waits for what it returns."""
        return self._job.begin_work(self._upstream.call(command, arguments), command)

    def hand_over(self, descriptor: int, name: str) -> None:
        """Give QEMU a descriptor."""
        self._job.wait_for(self._upstream.hand_over(descriptor, name), "getfd")


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
        with _opened(target, version, request) as sink:
            self.is_open = True
            take = partial(
                dump, access=self._access(), sink=sink, memory=memory, progress=_Meter(self)
            )
            try:
                try:
                    return take(request)
                except NotDumpedByQemuError:
                    return take(replace(request, exact=False))
            except DumpWriteError as error:
                raise _in_words_of_qemu(error, sink, request) from error

    def _access(self) -> GuestAccess:
        monitor = _ThreadMonitor(self, self._upstream)
        addresses = (self._upstream.address,)
        if not isinstance(self._upstream, QmpUpstream):
            native_dump = partial(dump_byte_through_file, monitor)
            return GuestAccess(monitor, None, native_dump, addresses)
        qmp = _ThreadQmp(self, self._upstream)
        native_dump = partial(dump_byte_through_descriptor, qmp)
        return GuestAccess(monitor, None, native_dump, addresses, qmp=qmp)

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


@contextmanager
def _opened(target: DumpTarget, version: QemuVersion, request: DumpRequest) -> Iterator[Sink]:
    verb = "create" if version >= _CREATE_SINCE else "open"
    failure = f"Could not {verb} '{target.name}'"
    with contextlib.ExitStack() as stack:
        if target.path is None:
            name = f"fd:{target.descriptor}"
        else:
            name = f"file:{target.path}"
            if reason := _why_not(target.name, target.path):
                raise DumpWriteError(f"{failure}: {reason}")
        try:
            sink = stack.enter_context(open_sink(name, force=True, standard_output=None))
        except DumpWriteError as error:
            cause = error.__cause__
            reason = (cause.strerror if isinstance(cause, OSError) else None) or error.message
            raise DumpWriteError(f"{failure}: {reason}") from error
        if request.raw and request.codec is not None and not sink.seekable:
            raise RequestError("kdump-raw formats require a seekable file")
        yield sink


def _why_not(name: str, path: Path) -> str | None:
    # What the kernel says to whoever opens it; we write aside, and would notice later.
    if not name:
        return os.strerror(errno.ENOENT)
    try:
        if not stat.S_ISDIR(path.parent.stat().st_mode):
            return os.strerror(errno.ENOTDIR)
        mode = path.stat().st_mode
    except FileNotFoundError:
        missing = path.parent if not path.parent.exists() else None
        return os.strerror(errno.ENOENT) if missing or name.endswith("/") else None
    except OSError as error:
        return error.strerror
    if stat.S_ISDIR(mode):
        return os.strerror(errno.EISDIR)
    return None if os.access(path, os.W_OK) else os.strerror(errno.EACCES)


def _in_words_of_qemu(error: DumpWriteError, sink: Sink, request: DumpRequest) -> DumpWriteError:
    cause = error.__cause__
    if not isinstance(cause, OSError):
        return error
    if request.codec is None:
        what = "save memory" if sink.bytes_written else "write elf header"
        return DumpWriteError(f"dump: failed to {what}: {cause.strerror}")
    what = "write page data" if sink.bytes_written else "write start flat header"
    # QEMU leaves the reason out.
    return DumpWriteError(f"dump: failed to {what}")


class DumpManager:
    """Takes dumps one at a time, and knows about the last one.

    Attributes:
        status: Of our last dump.
        job: Our last dump, or None.
        latest_is_native: QEMU has dumped since.
        on_event: Gets events for clients of QMP: QEMU's own, and DUMP_COMPLETED where QEMU's
            would be.
    """

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.status = DumpStatus.NONE
        self.job: DumpJob | None = None
        self.latest_is_native = False
        self.on_event: Callable[[Event], None] = lambda _event: None
        self._held_events: list[Event] = []
        self._task: asyncio.Task[None] | None = None
        upstream.on_event = self.take_event

    @property
    def active(self) -> bool:
        """A dump of ours is in process."""
        return self.status is DumpStatus.ACTIVE

    async def start(
        self, request: DumpRequest, target: DumpTarget, memory: str, *, release: Callable[[], None]
    ) -> DumpJob:
        """Start a dump and return when nothing can be refused any more.

        Args:
            request: What to write.
            target: Where to.
            memory: Name of the memory source, or `auto`.
            release: Called when the target's descriptor is used up, as QEMU uses it up.

        Raises:
            DumpError: It is refused.
        """
        if self.active:
            raise RequestError(IN_PROCESS)
        # From here on others are refused; what QEMU itself is doing is asked next.
        before = (self.status, self.job)
        self.status = DumpStatus.ACTIVE
        job = self.job = DumpJob(self._upstream)
        job.copies = request.snapshot
        try:
            await self._require_idle_qemu()
        except BaseException:
            self.status, self.job = before
            raise
        self._task = asyncio.create_task(
            self._run(job, request, target, memory, release=release, before=before)
        )
        await asyncio.shield(job.begun)
        if job.finished.done() and (error := job.finished.exception()) is not None:
            raise error
        return job

    async def _require_idle_qemu(self) -> None:
        answer = await self._upstream.execute_hmp("info dump")
        if "Status: active" in answer:
            raise RequestError(IN_PROCESS)
        status = await self._upstream.execute_hmp("info status")
        if "(inmigrate)" in status:
            newer = self._upstream.version >= _CREATE_SINCE
            raise RequestError(f"Dump not allowed during {'' if newer else 'incoming '}migration.")
        if self.job is not None:
            self.job.stopped_guest = "VM status: running" in status

    async def _run(
        self,
        job: DumpJob,
        request: DumpRequest,
        target: DumpTarget,
        memory: str,
        *,
        release: Callable[[], None],
        before: tuple[DumpStatus, DumpJob | None],
    ) -> None:
        report, failure = None, None
        try:
            report = await asyncio.to_thread(job.run, request, target, memory)
        except DumpError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - one dump must not end the proxy for everybody
            failure = DumpError(f"dump: {type(error).__name__}: {error}")
        if not isinstance(failure, UnsupportedTargetError):
            release()
        if job.is_open:
            self.latest_is_native = False
            self.status = DumpStatus.FAILED if failure else DumpStatus.COMPLETED
        else:
            self.status, self.job = before
        if job.has_begun:
            self.on_event(self._completed_event(job, failure))
        held, self._held_events = self._held_events, []
        for event in held:
            self.on_event(event)
        job.end(report, failure)

    def query(self) -> dict[str, object]:
        """Return what query-dump returns."""
        job = self.job
        total, completed = (job.total, job.completed) if job else (0, 0)
        return {"total": total, "status": self.status.value, "completed": min(completed, total)}

    def lines(self) -> str:
        """Return what `info dump` shows."""
        text = f"Status: {self.status.value}\r\n"
        if self.active and self.job:
            share = 100.0 * self.job.completed / max(self.job.total, 1)
            text += f"Finished: {min(share, 100.0):.2f} %\r\n"
        return text

    def cancel(self) -> None:
        """Cancel the dump that is in process.

        Raises:
            RequestError: There is none.
        """
        if not self.active or self.job is None:
            raise RequestError(NOT_IN_PROCESS)
        self.job.cancel()

    async def close(self) -> None:
        """Cancel, and wait until the guest runs again and nothing is left behind."""
        if self._task is not None and not self._task.done():
            with contextlib.suppress(RequestError):
                self.cancel()
            await asyncio.wait([self._task])

    def take_event(self, event: Event) -> None:
        """Pass QEMU's event on; RESUME follows DUMP_COMPLETED, as with QEMU's own dump."""
        copies = self.job is not None and self.job.copies
        if event.get("event") == "DUMP_COMPLETED":
            self.latest_is_native = True
        if self.active and event.get("event") == "RESUME" and not copies:
            self._held_events.append(event)
        else:
            self.on_event(event)

    def _completed_event(self, job: DumpJob, failure: DumpError | None) -> Event:
        data: dict[str, object] = {"result": self.query()}
        if failure is not None:
            data["error"] = failure.message
        seconds, fraction = divmod(time.time(), 1)
        timestamp = {"seconds": int(seconds), "microseconds": int(fraction * 1_000_000)}
        if failure is None:
            job.completed = job.total
            data["result"] = self.query()
        return {"timestamp": timestamp, "event": "DUMP_COMPLETED", "data": data}
