"""Stop the guest for a dump and let it run again, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.access import Monitor
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.qemu.monitor_text import RUNNING, parse_status


@contextmanager
def stopped(monitor: Monitor) -> Iterator[None]:
    """Keep the guest stopped inside the `with` block.

    A guest that ran runs again afterwards, also after an error or an interrupt; one that was
    stopped stays as it was.

    Raises:
        SourceError: It cannot be stopped, or cannot be resumed, or QEMU is dumping it itself and
            would resume it in the middle.
    """
    if "Status: active" in monitor.execute("info dump"):
        raise SourceError(
            "QEMU is writing a dump of its own", hint="try again when 'info dump' says completed"
        )
    if parse_status(monitor.execute("info status")) != RUNNING:
        yield
        return
    try:
        monitor.execute("stop")
        status = parse_status(monitor.execute("info status"))
        if status == RUNNING:
            raise SourceError("the guest does not stop")
        yield
    finally:
        _resume(monitor)


def _resume(monitor: Monitor) -> None:
    with uninterrupted():
        monitor.execute("cont")
