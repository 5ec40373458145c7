from __future__ import annotations

import struct

import pytest

from qemu_dump_ext.structures.utsname import parse_new_utsname
from qemu_dump_ext.structures.vmcoreinfo import (
    note_at_page_start,
    vmcoreinfo_number,
    vmcoreinfo_text,
    vmcoreinfo_value,
)

TEXT = b"OSRELEASE=6.1.0\nPAGESIZE=4096\nNUMBER(phys_base)=-442499072\nSYMBOL(x)=ffff\n"


def note(text: bytes = TEXT, **changes: int) -> bytes:
    words = {"namesz": 11, "descsz": len(text), "type": 0} | changes
    return struct.pack("<3I", *words.values()) + b"VMCOREINFO\0\0" + text


def test_values_and_numbers():
    assert vmcoreinfo_value(TEXT, "OSRELEASE") == "6.1.0"
    assert vmcoreinfo_value(TEXT, "RELEASE") is None
    assert vmcoreinfo_value(b"A=1\nBA=2\nA=3", "A") == "1"
    assert vmcoreinfo_value(b"BA=2\nA=3=4\r", "A") == "3=4\r"
    assert vmcoreinfo_value(b"A=", "A") == ""
    assert vmcoreinfo_value(b"B=\nA", "A") is None
    assert vmcoreinfo_number(TEXT, "NUMBER(phys_base)") == -442499072
    assert vmcoreinfo_number(TEXT, "NUMBER(phys_base)", 16) == -0x442499072
    assert vmcoreinfo_number(TEXT, "SYMBOL(x)", 16) == 0xFFFF
    assert vmcoreinfo_number(TEXT, "SYMBOL(x)") is None


def test_a_note_is_taken_without_what_follows_it():
    page = note().ljust(4096, b"\xee")
    found = note_at_page_start(page, "little")
    assert found == note() + b"\xee" * (-len(TEXT) % 4)
    assert vmcoreinfo_text(note(), "little") == TEXT


@pytest.mark.parametrize(
    "page",
    [
        note(namesz=10),
        note(type=1),
        note(descsz=0),
        note(descsz=1 << 31),
        note(b"OSRELEASE=%s\n"),  # the format string in the kernel image
        note(b"PAGESIZE=1\nOSRELEASE=1\n"),
        b"",
        note()[:20],
    ],
)
def test_what_is_no_note(page: bytes):
    assert note_at_page_start(page, "little") is None


def utsname(*strings: bytes) -> bytes:
    return b"".join(string.ljust(65, b"\0") for string in strings)


def test_utsname_of_a_kernel():
    data = utsname(b"Linux", b"(none)", b"6.1.0", b"#1 SMP", b"x86_64", b"")
    found = parse_new_utsname(data)
    assert found is not None
    assert (found.sysname, found.release, found.machine) == ("Linux", "6.1.0", "x86_64")
    assert found.encode()["version"] == b"#1 SMP"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"A" * 390,
        utsname(b"Linux", b"\xff", b"", b"", b"", b""),
        utsname(b"Linux\n", b"", b"", b"", b"", b""),
    ],
)
def test_memory_that_is_no_utsname(data: bytes):
    assert parse_new_utsname(data) is None
