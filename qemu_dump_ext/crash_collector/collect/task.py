"""What is to be collected."""

from __future__ import annotations

from collections.abc import Mapping

from qemu_dump_ext.connections.libvirt import LibvirtMonitor
from qemu_dump_ext.crash_collector.record import CrashCause, QemuFacts
from qemu_dump_ext.crash_collector.watch.guests import Guest
from qemu_dump_ext.crash_collector.watch.hmp_questions import HmpQuestions
from qemu_dump_ext.crash_collector.watch.patience import LimitedQmp, Patience
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.qemu.qmp import SharedQmp
from qemu_dump_ext.value import Value

GuestQmp = SharedQmp | LibvirtMonitor | HmpQuestions
"""QEMU's monitors, by a socket of ours or through libvirt; or its human monitor alone."""


def access_by(qmp: GuestQmp) -> GuestAccess:
    """Return the ways to a guest of which there are the monitors."""
    if isinstance(qmp, LibvirtMonitor):
        return GuestAccess.by_manager(qmp)
    if isinstance(qmp, HmpQuestions):
        return GuestAccess.by_hmp(qmp, pid=qmp.pid)
    return GuestAccess.by_qmp(qmp, pid=qmp.pid if isinstance(qmp, LimitedQmp) else None)


class CrashTask(Value):
    """One crash of one guest.

    Attributes:
        guest: Whose crash.
        cause: Why it counts.
        time: When it happened, as in records.
        facts: About its QEMU.
        qmp: The connection; None: QEMU is gone.
        gone: Why there is none.
        also: What else happened meanwhile, and how often; still counts.
        patience: For how long QEMU is asked; begins with the collection.
        message: What to call it where the kernel's log does not tell; None: by its cause.
    """

    guest: Guest
    cause: CrashCause
    time: str
    facts: QemuFacts
    qmp: GuestQmp | None
    gone: str
    also: Mapping[str, int]
    patience: Patience
    message: str | None = None
