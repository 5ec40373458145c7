"""QEMU's name of the target that it emulates: by QMP, or by the name of its program."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from qemu_dump_ext.errors import MonitorAnswerError, SourceError
from qemu_dump_ext.guest.access import DescriptorMonitor, GuestAccess
from qemu_dump_ext.qemu.process import find_qemu_process
from qemu_dump_ext.qemu.qmp_message import target_of

_PROGRAM = re.compile(r"(?:.*/)?qemu-system-(\w+)(?: \(deleted\))?")
_WORDS_MAX = 16  # a dynamic loader and its options may stand before the program
_COMMAND_LINE_MAX = 1 << 16


def target_name(access: GuestAccess) -> str | None:
    """Return QEMU's name of the target, such as `mipsel`, or None where it cannot be had.

    Without QMP, it is that of the program `qemu-system-NAME` at the other end of the connection.

    Raises:
        SourceError: QMP is there, and does not answer.
    """
    return target_by_program(access) if access.qmp is None else target_by_qmp(access)


def target_by_program(access: GuestAccess) -> str | None:
    """Return the same by the name of the program alone, of a QEMU on this host."""
    with contextlib.suppress(SourceError, OSError):
        return _of_process(access.pid or find_qemu_process(access.addresses))
    return None


def target_by_qmp(access: GuestAccess) -> str | None:
    """Return the same as far as QMP tells it, which is asked once."""
    if access.qmp is None:
        return None
    if not access.targets:
        access.targets.append(_ask(access.qmp))
    return access.targets[0]


def _ask(qmp: DescriptorMonitor) -> str | None:
    try:
        return target_of(qmp.begin_qmp("query-target")())
    except MonitorAnswerError:
        return None


def _of_process(pid: int) -> str | None:
    with Path(f"/proc/{pid}/cmdline").open("rb") as file:
        words = file.read(_COMMAND_LINE_MAX).decode("utf-8", "replace").split("\0")
    names = [str(Path(f"/proc/{pid}/exe").readlink()), *words[:_WORDS_MAX]]
    matches = (_PROGRAM.fullmatch(name) for name in names)
    return next((match[1] for match in matches if match is not None), None)
