"""Stop the guest for a dump and let it run again, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest import Monitor
from qemu_dump_ext.monitor_text import parse_status

_RUNNING = "running"


@contextmanager
def stopped(monitor: Monitor) -> Iterator[None]:
    """Keep the guest stopped inside the `with` block.

    A guest that ran runs again afterwards, also after an error or an interrupt; one that was
    stopped stays as it was.

    Raises:
        SourceError: It cannot be stopped, or cannot be resumed.
    """
    if parse_status(monitor.execute("info status")) != _RUNNING:
        yield
        return
    try:
        monitor.execute("stop")
        status = parse_status(monitor.execute("info status"))
        if status == _RUNNING:
            raise SourceError("the guest does not stop")
        yield
    finally:
        _resume(monitor)


def _resume(monitor: Monitor) -> None:
    try:
        monitor.execute("cont")
    except KeyboardInterrupt:
        monitor.execute("cont")
        raise
