"""VMCOREINFO: the text in which a Linux kernel tells dump readers about itself.

Source: Linux kernel/vmcore_info.c (crash_core.c before v6.9), Documentation/admin-guide/kdump/
vmcoreinfo.rst. It is guest memory and therefore untrusted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qemu_dump_ext.c_struct import ByteOrder
from qemu_dump_ext.kdump_structs import UTSNAME_FIELDS, UTSNAME_SIZE

VMCOREINFO_NOTE_NAME = "VMCOREINFO"
UTSNAME_TOTAL_SIZE = UTSNAME_SIZE * len(UTSNAME_FIELDS)
MAX_VMCOREINFO_SIZE = 1 << 16
_NOTE_HEADER_SIZE = 12
_NOTE_NAME_FIELD = VMCOREINFO_NOTE_NAME.encode() + b"\0\0"


def vmcoreinfo_value(text: bytes, key: str) -> str | None:
    """Return what stands behind `KEY=`, or None."""
    match = re.search(rb"^" + re.escape(key.encode()) + rb"=(.*)$", text, re.MULTILINE)
    return match[1].decode("ascii", "replace") if match else None


def vmcoreinfo_number(text: bytes, key: str, base: int = 0) -> int | None:
    """Return a number in `base` (0: as its prefix says), or None where it is none."""
    value = vmcoreinfo_value(text, key)
    if value is None:
        return None
    try:
        return int(value, base)
    except ValueError:
        return None


@dataclass(frozen=True)
class UtsName:
    """What `uname` prints in the guest; each member at most 64 bytes."""

    sysname: str = ""
    nodename: str = ""
    release: str = ""
    version: str = ""
    machine: str = ""
    domainname: str = ""

    def encode(self) -> dict[str, bytes]:
        """Return the members as a kdump header holds them, by name."""
        return {name: getattr(self, name).encode()[: UTSNAME_SIZE - 1] for name in UTSNAME_FIELDS}


def parse_new_utsname(data: bytes) -> UtsName | None:
    """Parse struct new_utsname: six strings of 65 bytes.

    Returns:
        None where it is none: guest memory may hold anything.
    """
    if len(data) < UTSNAME_TOTAL_SIZE:
        return None
    strings = []
    for index in range(len(UTSNAME_FIELDS)):
        raw, terminator, _ = data[index * UTSNAME_SIZE :][:UTSNAME_SIZE].partition(b"\0")
        if not terminator or not raw.isascii():
            return None
        text = raw.decode()
        if text and not text.isprintable():
            return None
        strings.append(text)
    return UtsName(*strings)


def note_at_page_start(page: bytes | memoryview, byte_order: ByteOrder) -> bytes | None:
    """Return the VMCOREINFO note that begins with this memory, header included, or None.

    The kernel keeps the note at the start of a page; the text begins with OSRELEASE= and has a
    PAGESIZE= line, which the format string in the kernel image has not.

    Args:
        page: At least as long as the note; it may be guest memory of any content.
        byte_order: Of the guest.
    """
    name_size, text_size, note_type = (
        int.from_bytes(page[offset : offset + 4], byte_order) for offset in (0, 4, 8)
    )
    start = _NOTE_HEADER_SIZE + len(_NOTE_NAME_FIELD)
    if (
        name_size != len(VMCOREINFO_NOTE_NAME) + 1
        or note_type != 0
        or not 0 < text_size <= MAX_VMCOREINFO_SIZE
        or bytes(page[_NOTE_HEADER_SIZE:start]) != _NOTE_NAME_FIELD
    ):
        return None
    text = bytes(page[start : start + text_size])
    if not text.startswith(b"OSRELEASE=") or b"\nPAGESIZE=" not in text:
        return None
    return bytes(page[: start + text_size + -text_size % 4])


def vmcoreinfo_text(note: bytes, byte_order: ByteOrder) -> bytes:
    """Return the text of a guest note; empty where it is none of VMCOREINFO."""
    start = _NOTE_HEADER_SIZE + len(_NOTE_NAME_FIELD)
    if note[_NOTE_HEADER_SIZE:start] != _NOTE_NAME_FIELD:
        return b""
    return note[start : start + int.from_bytes(note[4:8], byte_order)]
