"""Stop the guest for a dump and let it run again, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest import Monitor
from qemu_dump_ext.interrupts import uninterrupted
from qemu_dump_ext.monitor_queries import read_register_texts
from qemu_dump_ext.monitor_text import RUNNING, parse_status


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


@contextmanager
def undisturbed(monitor: Monitor) -> Iterator[None]:
    """Notice when somebody else let the guest run, or reset it, inside the `with` block.

    Raises:
        SourceError: Its run state or a register changed: what was read does not fit together.
    """
    # Being read for the first time changes mideleg of RISC-V in QEMU 7.2.
    read_register_texts(monitor)
    before = _fingerprint(monitor)
    yield
    if _fingerprint(monitor) != before:
        raise SourceError(
            "somebody else let the guest run, or reset it, while it was dumped",
            hint="dump it again, and keep other clients of QEMU from it meanwhile",
        )


def _fingerprint(monitor: Monitor) -> tuple[str, Mapping[int, str]]:
    return parse_status(monitor.execute("info status")), read_register_texts(monitor)


def _resume(monitor: Monitor) -> None:
    with uninterrupted():
        monitor.execute("cont")
