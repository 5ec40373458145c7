"""The one dump that the proxy takes at a time."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections.abc import Callable

from qemu_dump_ext.errors import DumpError, RequestError, UnsupportedTargetError
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.qemu.dump_listeners import WHO_LISTENS, why_listeners_forbid_dumps
from qemu_dump_ext.qemu.monitor_text import parse_dump_status, parse_migration, parse_status
from qemu_dump_ext.qemu.run_state import DUMP_ACTIVE, why_not_dumped
from qemu_dump_ext.qemu.run_states import Treatment, treatment

from .dump_job import IN_PROCESS, DumpJob
from .dump_target import DumpTarget
from .upstream.upstream import Event, Upstream

NOT_IN_PROCESS = "There is no dump in process."


class DumpStatus(enum.Enum):
    """QMP's DumpStatus."""

    NONE = "none"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"


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
        job.copies = request.snapshot or request.live is not None
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

    async def require_native_allowed(self) -> None:
        """Refuse to let QEMU itself dump the guest where somebody listens who must not.

        Raises:
            RequestError: Somebody does.
        """
        reason = why_listeners_forbid_dumps(await self._upstream.execute_hmp(WHO_LISTENS))
        if reason is not None:
            raise RequestError(f"QEMU itself is not asked for a dump: {reason}")

    async def _require_idle_qemu(self) -> None:
        upstream = self._upstream
        if parse_dump_status(await upstream.execute_hmp("info dump")) == DUMP_ACTIVE:
            raise RequestError(IN_PROCESS)
        state = parse_status(await upstream.execute_hmp("info status"))
        migration = parse_migration(await upstream.execute_hmp("info migrate"))
        refusal = why_not_dumped(state, migration, lambda: upstream.version)
        if refusal is not None:
            raise RequestError(refusal)
        if self.job is not None:
            self.job.stopped_guest = treatment(state) is Treatment.STOP

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
        if self.job is not None:
            self.job.hear(event)
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
