"""Who would hear QEMU announce a dump of its own, and must not.

QEMU tells every client of QMP that a dump is complete (DUMP_COMPLETED). libvirtd up to 9.0 at
least, which waits for none, follows a NULL pointer then and ends, and with it the management of
every guest of the host. libvirt gives its monitor the same name in every QEMU that it starts.

Source: libvirt src/qemu/qemu_command.c qemuBuildMonitorCommandLine(), src/qemu/qemu_process.c
qemuProcessHandleDumpCompleted().
"""

from __future__ import annotations

import re

from qemu_dump_ext.guest.access import Monitor

WHO_LISTENS = "info chardev"
_LABEL = re.compile(r"^(?P<label>[^\s:]+): filename=", re.MULTILINE)
_OF_LIBVIRT = "charmonitor"


def why_dumps_are_forbidden(monitor: Monitor) -> str | None:
    """Return why QEMU must not be asked for a dump of its own, or None: it may be.

    Raises:
        SourceError: The monitor does not answer.
    """
    return why_listeners_forbid_dumps(monitor.execute(WHO_LISTENS))


def why_listeners_forbid_dumps(answer: str) -> str | None:
    """Return the same by the monitor's answer to WHO_LISTENS."""
    labels = _LABEL.findall(answer)
    if _OF_LIBVIRT in labels:
        return "libvirt listens to this QEMU, and libvirtd may end when QEMU announces a dump"
    if not labels:
        return "QEMU does not tell who listens to it, and a libvirtd may end when it does"
    return None
