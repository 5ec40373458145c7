"""A guest that can be reached, and one that stands still."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from types import TracebackType
from typing import BinaryIO, Self

from qemu_dump_ext.api.targets import sink_for
from qemu_dump_ext.api.views import GuestView
from qemu_dump_ext.connections.silent import open_guest_or_memory
from qemu_dump_ext.connections.target import parse_target
from qemu_dump_ext.dump_formats import all_dump_formats
from qemu_dump_ext.engine import dump as dumping
from qemu_dump_ext.engine.guests import FoundGuest, list_guests
from qemu_dump_ext.engine.info import GuestDescription, describe, describe_guest
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.engine.stopped_guest import StoppedGuest as StillGuest
from qemu_dump_ext.engine.stopped_guest import import_plug_ins, stopped_guest
from qemu_dump_ext.memory_sources import AUTO
from qemu_dump_ext.memory_sources.process import SOURCE as PROCESS
from qemu_dump_ext.plan.request import DEFAULT_FORMAT, DumpOptions, DumpRequest
from qemu_dump_ext.progress import ProgressMeter

_PLAIN = DumpOptions()


class StoppedGuest(GuestView):
    """A guest that stands still, as `Guest.stopped` gives it; not for use behind the `with` block.

    Attributes:
        memory_source: Where guest memory comes from.
        passed_over: Faster memory sources, and why each was not taken.
    """

    def __init__(self, still: StillGuest) -> None:
        self._still = still

    @property
    def _view(self) -> StillGuest:
        return self._still

    @property
    def memory_source(self) -> str:
        """Where guest memory comes from."""
        return self._still.memory.name

    @property
    def passed_over(self) -> Sequence[tuple[str, str]]:
        """Faster memory sources, and why each was not taken."""
        return self._still.passed_over

    def info(self) -> GuestDescription:
        """Say what would be dumped.

        Raises:
            SourceError: The guest was lost.
        """
        return describe(self._still)

    def dump(
        self,
        file: str | PathLike[str] | BinaryIO,
        *,
        format: str = DEFAULT_FORMAT,  # noqa: A002 - the word of every door
        options: DumpOptions = _PLAIN,
        force: bool = False,
    ) -> DumpReport:
        """Write a dump, as `Guest.dump` does; the guest stands still before and afterwards."""
        with sink_for(file, force=force) as sink:
            return dumping.dump_stopped(
                options.of_format(format), self._still, sink, progress=ProgressMeter(None)
            )


class Guest:
    """A guest that can be reached by a monitor; `connect` gives it.

    Close it, or use it in a `with`.

    QEMU serves one client on a monitor: while this is open, nobody else is served there.
    """

    def __init__(self, target: str, *, memory_alone: bool = False) -> None:
        self._opened = ExitStack()
        self._access = self._opened.enter_context(
            open_guest_or_memory(parse_target(target), memory_alone=memory_alone)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; harmless when repeated."""
        self._opened.close()

    def info(self) -> GuestDescription:
        """Say what would be dumped; the guest is stopped meanwhile.

        Raises:
            SourceError: It cannot be reached.
        """
        return describe_guest(self._access.anew())

    @contextmanager
    def stopped(self, memory: str = AUTO) -> Iterator[StoppedGuest]:
        """Keep the guest stopped for the time of a `with` block.

        One that ran runs again afterwards, also after an error or Ctrl-C; one that was stopped
        stays as it was. What it is, is asked once.

        Args:
            memory: Name of the memory source, or `auto`.

        Raises:
            SourceError: It cannot be reached, stopped, or resumed.
        """
        dumping.prepare(DumpRequest())
        all_dump_formats()  # which of them is wanted is not known yet
        access = self._access.anew()
        import_plug_ins(access, "linux.call_trace", "linux.kernel_pages")
        with stopped_guest(access, memory) as still:
            yield StoppedGuest(still)

    def dump(
        self,
        file: str | PathLike[str] | BinaryIO,
        *,
        format: str = DEFAULT_FORMAT,  # noqa: A002 - the word of every door
        memory: str = AUTO,
        options: DumpOptions = _PLAIN,
        force: bool = False,
    ) -> DumpReport:
        """Write a dump; the guest is stopped meanwhile.

        Args:
            file: Path, or something open for writing that has a descriptor. A path is complete
                afterwards, or as it was before.
            format: `elf`, `kdump-zlib`, `kdump-raw-zlib`, ...
            memory: Name of the memory source, or `auto`.
            options: What else is asked for.
            force: Replace a file that exists.

        Raises:
            RequestError: What is asked for is impossible.
            SourceError: The guest cannot be reached, or was lost.
            DumpWriteError: The dump cannot be written.
        """
        with sink_for(file, force=force) as sink:
            return dumping.dump(
                options.of_format(format),
                self._access.anew(),
                sink,
                memory=memory,
                progress=ProgressMeter(None),
            )


def guests() -> list[FoundGuest]:
    """Return the guests of this host that can be seen; nobody is connected to, nothing stopped.

    Each is reached by `connect(f"pid:{guest.pid}")`.

    Raises:
        SourceError: There is no /proc.
    """
    return list_guests()


def connect(target: str) -> Guest:
    """Connect to a guest.

    Args:
        target: Its QMP socket: path of a unix socket, `HOST:PORT` or `[IPV6]:PORT`; or
            `name:NAME`, `pid:N` for a guest of this host, as `qemu-dump guests` shows them; or
            `hmp:MONITOR` for its human monitor; or `libvirt:DOMAIN` through libvirt.

    Raises:
        RequestError: Several guests are called so.
        ConnectError: It cannot be connected to.
    """
    return Guest(target)


def dump(
    target: str,
    file: str | PathLike[str] | BinaryIO,
    *,
    format: str = DEFAULT_FORMAT,  # noqa: A002 - the word of every door
    memory: str = AUTO,
    options: DumpOptions = _PLAIN,
    force: bool = False,
) -> DumpReport:
    """Connect to a guest and write a dump of it, as `connect` and `Guest.dump` do.

    Of one on this host whose monitor does not answer, the memory alone by `memory="process"`.
    """
    with Guest(target, memory_alone=memory == PROCESS.name) as guest:
        return guest.dump(file, format=format, memory=memory, options=options, force=force)
