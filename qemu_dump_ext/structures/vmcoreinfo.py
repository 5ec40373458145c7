"""VMCOREINFO: the text in which a Linux kernel tells dump readers about itself.

Source: Linux kernel/vmcore_info.c (crash_core.c before v6.9), Documentation/admin-guide/kdump/
vmcoreinfo.rst. It is guest memory and therefore untrusted.
"""

from __future__ import annotations

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.untrusted import parse_unsigned

PAGE_SIZES = frozenset((4096, 8192, 16384, 32768, 65536))
"""Sizes of a page, in bytes, that a kernel may say of itself: the note is guest memory."""
VMCOREINFO_NOTE_NAME = "VMCOREINFO"
MAX_VMCOREINFO_SIZE = 1 << 16
_NOTE_HEADER_SIZE = 12
_TWO_POINTERS_OF_32_BITS = 8
_NOTE_NAME_FIELD = VMCOREINFO_NOTE_NAME.encode() + b"\0\0"


def vmcoreinfo_value(text: bytes, key: str) -> str | None:
    """Return what stands behind `KEY=`, or None."""
    begin = key.encode() + b"="
    at = 0 if text.startswith(begin) else text.find(b"\n" + begin) + 1
    if not text.startswith(begin, at):
        return None
    end = text.find(b"\n", at)
    return text[at + len(begin) : end if end >= 0 else None].decode("ascii", "replace")


def vmcoreinfo_number(text: bytes, key: str, base: int = 0) -> int | None:
    """Return a number of at most 64 bits in `base`, or None where it is none.

    Args:
        text: Of VMCOREINFO.
        key: What stands in front of the number.
        base: 10 or 16; 0: as the number's prefix says. There may be a sign in each.
    """
    value = vmcoreinfo_value(text, key) or ""
    digits = value.removeprefix("-")
    number = parse_unsigned(digits, base or (16 if digits[:2] in {"0x", "0X"} else 10))
    return -number if number is not None and digits != value else number


class VmcoreinfoNumbers:
    """The numbers in a VMCOREINFO by their keys; those of symbols are in base 16."""

    def __init__(self, text: bytes) -> None:
        """Keep the text, which is untrusted."""
        self._text = text

    def get(self, key: str) -> int | None:
        """Return a number, or None where there is none."""
        return vmcoreinfo_number(self._text, key, 16 if key.startswith("SYMBOL(") else 0)

    def needed(self, key: str) -> int:
        """Return a number.

        Raises:
            SourceError: There is none.
        """
        value = self.get(key)
        if value is None:
            raise SourceError(f"VMCOREINFO lacks {key}")
        return value

    def require(self, *keys: str) -> None:
        """Check that there is one of several numbers, of which each kernel has another.

        Raises:
            SourceError: There is none of them.
        """
        if all(self.get(key) is None for key in keys):
            raise SourceError(f"VMCOREINFO lacks {' and '.join(keys)}")


def kernel_word_size(text: bytes) -> int:
    """Return the size of the kernel's `long`, in bytes; the dump's may be larger."""
    return 4 if vmcoreinfo_number(text, "SIZE(list_head)") == _TWO_POINTERS_OF_32_BITS else 8


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
