"""A stream of a guest as it is at one moment, which QEMU writes while the guest runs on.

QEMU stops the guest to note what its devices are, protects its memory from being written, and lets
it run, all within milliseconds. Then it writes memory, first those pages that the guest is about to
change. That is a migration to QEMU, to a descriptor of ours, with the capability
`background-snapshot`, since QEMU 6.0.

Other clients of QMP see it as a migration: by `query-migrate`, by the events STOP and RESUME, and
by MIGRATION where they have asked for it.

Source: QEMU migration/migration.c bg_migration_thread(), migration/options.c migrate_caps_check().
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from typing import Any

from qemu_dump_ext.errors import CorruptDumpError, MonitorAnswerError, NotLiveError, SourceError
from qemu_dump_ext.guest.access import GuestAccess, QmpMonitor
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.qemu._guardian_program import STREAM_NAME
from qemu_dump_ext.qemu.guardian import Guardian
from qemu_dump_ext.qemu.monitor_queries import find_devices
from qemu_dump_ext.qemu.monitor_text import RUNNING, parse_version
from qemu_dump_ext.qemu.run_state import (
    change_run_state,
    read_migration,
    read_run_state,
    require_dumpable,
)
from qemu_dump_ext.qemu.run_states import IDLE_MIGRATIONS, PAUSED
from qemu_dump_ext.structures.dialect import QemuVersion
from qemu_dump_ext.structures.migration import (
    MigrationStream,
    PageTaker,
    StreamBuffer,
    parse_stream,
)
from qemu_dump_ext.value import Value

CAPABILITY = "background-snapshot"
_COMPLETED, _POSTMIGRATE = "completed", "postmigrate"
_LETS_GO_SINCE: QemuVersion = (10, 0, 0)
"""From here on QEMU is known to let go of guest memory however a stream ends; 7.2 does not."""
_PIPE_SIZE = 1 << 20
_POLL_SECONDS = 0.01
_EVENT_SECONDS = 5.0
_END_SECONDS = 150.0
_CANCEL_SECONDS = 10.0
_UNSEEN_WRITERS = r"vfio-.*|vhost-(?:user|vdpa)-.*"
"""Types of devices that write guest memory behind QEMU's back, where no protection sees it."""
_UNSEEN_NETWORKS = ("type=vhost-user", "type=vhost-vdpa")
_VIRTIO_MEM = r"virtio-mem-(?:pci|ccw)"


class LiveStream(Value):
    """What QEMU has written.

    Attributes:
        stream: What it tells besides the pages.
        pause_seconds: How long the guest stood still: from STOP to RESUME, as QEMU's events have
            it.
        protected_seconds: How long it took from then on until nothing slowed the guest any more.
    """

    stream: MigrationStream
    pause_seconds: float
    protected_seconds: float


class _Events:
    """Hears when QEMU stops the guest and lets it run."""

    def __init__(self) -> None:
        self.stopped: float | None = None
        self.resumed: float | None = None
        self.heard_resume: float | None = None
        self.known = threading.Event()

    def hear(self, event: Mapping[str, Any]) -> None:
        """Know an event; called in any thread."""
        name, stamp = event.get("event"), event.get("timestamp")
        if not isinstance(stamp, Mapping):
            return
        at = float(stamp.get("seconds", 0)) + float(stamp.get("microseconds", 0)) / 1e6
        if name == "STOP" and self.stopped is None:
            self.stopped = at
        elif name == "RESUME" and self.stopped is not None and self.resumed is None:
            self.resumed = at
            self.heard_resume = time.monotonic()
            self.known.set()

    @property
    def left_stopped(self) -> bool:
        """Whether the guest was stopped, and never let run again."""
        return self.stopped is not None and self.resumed is None


def require_streamable(access: GuestAccess) -> QmpMonitor:
    """Return the QMP by which a guest can be streamed now.

    Raises:
        NotLiveError: It cannot be; says why.
        RequestError: QEMU refuses any dump in its run state.
        SourceError: QEMU dumps it itself, or does not answer.
    """
    qmp = access.qmp
    if qmp is None or not qmp.passes_descriptors:
        raise NotLiveError(
            "QEMU streams a running guest only to a descriptor that it gets by QMP",
            hint="--qmp with the path of a unix socket",
        )
    state = require_dumpable(access)
    if state != RUNNING:
        raise NotLiveError(f"the guest does not run, it is {state}", stands_still=True)
    if reasons := _blocked_reasons(qmp):
        raise NotLiveError(f"QEMU cannot stream this guest: {reasons[0]}")
    for pattern, reason in (
        (_UNSEEN_WRITERS, "writes its memory where QEMU does not see it"),
        (_VIRTIO_MEM, "tells only while the guest stands still what of it is plugged"),
    ):
        if devices := find_devices(access.monitor, pattern):
            raise NotLiveError(f"{devices[0]} {reason}")
    networks = access.monitor.execute("info network")
    if unseen := [kind for kind in _UNSEEN_NETWORKS if kind in networks]:
        raise NotLiveError(f"a network of {unseen[0]} writes its memory where QEMU does not see it")
    return qmp


def _blocked_reasons(qmp: QmpMonitor) -> list[str]:
    answer = qmp.begin_qmp("query-migrate")()
    reasons = answer.get("blocked-reasons") if isinstance(answer, Mapping) else None
    return [str(reason) for reason in reasons] if isinstance(reasons, list) else []


def stream_running_guest(access: GuestAccess, pages: PageTaker) -> LiveStream:
    """Have QEMU stream a running guest; it runs on, whatever happens, and nothing is left set.

    Args:
        access: The ways to the guest.
        pages: Gets its memory.

    Raises:
        NotLiveError: QEMU refuses; the guest was not touched.
        SourceError: The stream failed, or makes no sense.
        DumpWriteError: `pages` has no room.
    """
    qmp = require_streamable(access)
    with refused_as(SourceError, "get a pipe for QEMU's stream"):
        ends = os.pipe()
    with FileIO(ends[0], "rb") as reader, FileIO(ends[1], "wb") as writer:
        with contextlib.suppress(OSError):  # as large as the host allows
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        must_end = hangs_when_ended(access)
        with _capability(access, qmp, reader.fileno() if must_end else None):
            return _Streaming(access, qmp, reader, writer, must_end=must_end).run(pages)


def hangs_when_ended(access: GuestAccess) -> bool:
    """Tell whether a stream that ends before its end would hang the guest.

    QEMU leaves its memory protected then, and every vCPU stands at its next write for good, while
    QEMU says that it runs.
    """
    return parse_version(access.monitor.execute("info version")) < _LETS_GO_SINCE


@contextmanager
def _capability(access: GuestAccess, qmp: QmpMonitor, stream: int | None) -> Iterator[None]:
    """Have the capability set in a `with` block, and as it was behind it.

    Args:
        access: The ways to the guest.
        qmp: One of them.
        stream: What is read to its end if this process is killed; None: nothing.
    """
    ours = not _is_set(qmp)
    kind, address = access.rescue or ("qmp", qmp.address)
    guardian = Guardian(kind, address, CAPABILITY if ours else "", stream)
    try:
        if ours:
            _set(qmp, on=True)
    except MonitorAnswerError as error:
        guardian.dismiss()
        raise NotLiveError(f"QEMU: {error.answer.strip()}") from error
    except BaseException:
        guardian.act()
        raise
    try:
        # Without it, what follows would be a migration that takes the guest away.
        if not _is_set(qmp):
            raise NotLiveError(f"QEMU does not keep the capability {CAPABILITY} set")
        yield
    finally:
        with uninterrupted():
            try:
                _wait_for_cleanup(qmp, ours=ours)
                if ours:
                    _set(qmp, on=False)
            except SourceError:
                guardian.act()
            else:
                guardian.dismiss()


def _is_set(qmp: QmpMonitor) -> bool:
    capabilities = qmp.begin_qmp("query-migrate-capabilities")()
    if not isinstance(capabilities, list):
        return False
    known = {
        one.get("capability"): one.get("state") for one in capabilities if isinstance(one, dict)
    }
    if CAPABILITY not in known:
        raise NotLiveError(f"this QEMU has no {CAPABILITY}", hint="QEMU 6.0 and newer have")
    if known.get("x-ignore-shared") is True:
        raise NotLiveError("QEMU leaves shared memory out of its streams (x-ignore-shared)")
    return known[CAPABILITY] is True


def _set(qmp: QmpMonitor, *, on: bool) -> None:
    wanted = [{"capability": CAPABILITY, "state": on}]
    qmp.begin_qmp("migrate-set-capabilities", {"capabilities": wanted})()


def _wait_for_cleanup(qmp: QmpMonitor, *, ours: bool) -> None:
    """Wait until QEMU has let go of guest memory, which it says nowhere.

    It does so some time after it has said how the migration ended, if the capability is set by
    then. Were it taken away before, memory would stay protected, and the guest would hang at the
    next write (seen with 7.2). To set it once more is refused as long as memory is protected.

    Args:
        qmp: Of the guest.
        ours: Nobody else had set it; where somebody had, and has taken it away, it stays so.

    Raises:
        SourceError: It takes too long.
    """
    deadline = time.monotonic() + _END_SECONDS
    while ours or _is_set(qmp):
        try:
            _set(qmp, on=True)
        except MonitorAnswerError as error:
            if time.monotonic() > deadline:
                raise SourceError(f"QEMU does not let go of guest memory: {error}") from error
            time.sleep(_POLL_SECONDS)
        else:
            return


class _Streaming:
    """One stream, from the first question to its end, on every path."""

    def __init__(
        self,
        access: GuestAccess,
        qmp: QmpMonitor,
        reader: FileIO,
        writer: FileIO,
        *,
        must_end: bool,
    ) -> None:
        self._access = access
        self._qmp = qmp
        self._reader = reader
        self._writer = writer
        self._must_end = must_end
        self._events = _Events()
        self._begun = self._finished = False

    def run(self, pages: PageTaker) -> LiveStream:
        """Have it written, and take it."""
        with self._qmp.listening(self._events.hear):
            try:
                stream = self._take(pages)
            except CorruptDumpError as error:
                raise SourceError(f"QEMU's stream of the guest: {error}") from error
            finally:
                with uninterrupted():
                    self._end()
        if stream.problem is not None:
            raise SourceError(f"QEMU's stream of the guest: {stream.problem}")
        return LiveStream(stream, *_times(self._events))

    def _take(self, pages: PageTaker) -> MigrationStream:
        self._qmp.hand_over(self._writer.fileno(), STREAM_NAME)
        self._writer.close()
        _require_running(self._access)
        self._begun = True
        try:
            self._qmp.begin_qmp("migrate", {"uri": f"fd:{STREAM_NAME}"})()
        except MonitorAnswerError as error:
            self._begun = False
            raise NotLiveError(f"QEMU: {error.answer.strip()}") from error
        stream = parse_stream(StreamBuffer(self._fill), pages)
        self._finished = True
        return stream

    def _fill(self, buffer: memoryview) -> int:
        arrived = select.poll()
        arrived.register(self._reader, select.POLLIN)
        if not arrived.poll(1000 * _END_SECONDS):
            raise SourceError(f"QEMU's stream of the guest stood still for {_END_SECONDS:g} s")
        return self._reader.readinto(buffer) or 0

    def _end(self) -> None:
        """Wait until QEMU is done, and see to it that the guest runs.

        Raises:
            SourceError: QEMU failed, or does not end it.
        """
        self._writer.close()
        if not self._finished:
            # QEMU may have taken it; or else it would never be at its end.
            with contextlib.suppress(SourceError):
                self._qmp.begin_qmp("closefd", {"fdname": STREAM_NAME})()
        if not self._begun:
            return
        if self._must_end:
            rest = memoryview(bytearray(_PIPE_SIZE))
            with contextlib.suppress(SourceError):  # the guardian reads on
                while self._fill(rest):
                    pass
        self._reader.close()
        status = self._wait()
        state = read_run_state(self._access)
        if (state == PAUSED and self._events.left_stopped) or state == _POSTMIGRATE:
            # It failed between stopping the guest and letting it run, or somebody took the
            # capability away in the last moment.
            change_run_state(self._access, "cont")
            raise SourceError(f"QEMU's stream of the guest {status}: the guest was let run")
        if self._finished and status != _COMPLETED:
            raise SourceError(f"QEMU's stream of the guest {status}{self._reason()}")

    def _wait(self) -> str:
        """Return how it ended."""
        started = time.monotonic()
        cancelled = self._must_end
        while (status := read_migration(self._access)) not in IDLE_MIGRATIONS:
            waited = time.monotonic() - started
            if waited > _END_SECONDS:
                raise SourceError(f"QEMU does not end its stream of the guest, which is {status}")
            if waited > _CANCEL_SECONDS and not cancelled:
                cancelled = True
                with contextlib.suppress(MonitorAnswerError):
                    self._qmp.begin_qmp("migrate_cancel")()
            time.sleep(_POLL_SECONDS)
        return status

    def _reason(self) -> str:
        answer = self._qmp.begin_qmp("query-migrate")()
        reason = answer.get("error-desc") if isinstance(answer, Mapping) else None
        return f": {reason}" if reason else ""


def _require_running(access: GuestAccess) -> None:
    # As late as can be: QEMU would let it run, or 7.2 would abort, in another state.
    state = read_run_state(access)
    if state != RUNNING:
        raise NotLiveError(f"the guest does not run, it is {state}", stands_still=True)


def _times(events: _Events) -> tuple[float, float]:
    events.known.wait(_EVENT_SECONDS)  # which may come behind answers, by libvirt
    if events.stopped is None or events.resumed is None or events.heard_resume is None:
        raise SourceError("QEMU does not tell how long the guest stood still: no STOP and RESUME")
    return events.resumed - events.stopped, time.monotonic() - events.heard_resume
