"""What a Windows dump of a guest has besides its memory, from the best source that there is."""

from __future__ import annotations

from dataclasses import replace

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.win_dmp import WindowsDump
from qemu_dump_ext.windows.dump_header import header_of_note
from qemu_dump_ext.windows.kernel import header_of_kernel
from qemu_dump_ext.windows.system_memory import WindowsGuest


def describe_windows(guest: WindowsGuest, note: bytes | None, dialect: Dialect) -> WindowsDump:
    """Return the dump that the header of a driver describes, or else one of the kernel alone.

    Args:
        guest: Does not change.
        note: From QEMU's vmcoreinfo device; empty where there is none, None where it could not be
            had.
        dialect: How the dump is spelt. Of a guest without such a header QEMU takes none.

    Raises:
        RequestError: The guest does not run Windows, or not enough of it can be found.
        SourceError: Memory, or a register, cannot be had.
    """
    try:
        return _of_driver(guest, note, dialect)
    except RequestError as refused:
        if dialect.windows_as_qemu:
            raise
        try:
            made = header_of_kernel(guest, dialect)
        except RequestError as error:
            told = f"{refused.message}, and {error.message}"
            raise RequestError(told, hint=refused.hint) from error
        return replace(made, remarks=(refused.message, *made.remarks))


def _of_driver(guest: WindowsGuest, note: bytes | None, dialect: Dialect) -> WindowsDump:
    if note is None:
        raise RequestError("win-dump: the note of the vmcoreinfo device could not be had")
    return header_of_note(guest, note, dialect)
