"""Migration streams made by hand: of a RISC-V machine of a few pages, and of whatever a test asks.

Laid out as QEMU's docs/devel/migration.rst tells, and as streams of QEMU 7.2 and 11 are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

PAGE = 4096
HEAD = b"QEVM" + (3).to_bytes(4, "big")
EOF = b"\0"
ZERO, MEM_SIZE, DATA, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
_START, _PART, _FULL = 1, 2, 4
_RAM_ID = 2
RAM_NAME = "riscv_virt_board.ram"


def name_of(text: str) -> bytes:
    """Return a name with its length before it."""
    return bytes((len(text),)) + text.encode()


def configuration(machine: str, *parts: bytes) -> bytes:
    """Return the section that names the machine, with subsections behind it."""
    return b"\x07" + len(machine).to_bytes(4, "big") + machine.encode() + b"".join(parts)


def subsection(name: str, data: bytes, version: int = 1) -> bytes:
    """Return a subsection."""
    return b"\x05" + name_of(name) + version.to_bytes(4, "big") + data


def footer(number: int) -> bytes:
    """Return what ends a section."""
    return b"\x7e" + number.to_bytes(4, "big")


def section(kind: int, number: int, name: str, data: bytes, instance: int = 0) -> bytes:
    """Return a section that names itself."""
    head = bytes((kind,)) + number.to_bytes(4, "big") + name_of(name)
    return head + instance.to_bytes(4, "big") + (1).to_bytes(4, "big") + data + footer(number)


def part(number: int, data: bytes) -> bytes:
    """Return a section that goes on."""
    return bytes((_PART,)) + number.to_bytes(4, "big") + data + footer(number)


def ram_word(offset: int, flags: int, block: str = "") -> bytes:
    """Return what stands before a page."""
    return (offset | flags).to_bytes(8, "big") + (name_of(block) if block else b"")


def block_list(blocks: Mapping[str, int]) -> bytes:
    """Return the list of RAM blocks, by their sizes."""
    told = b"".join(name_of(name) + size.to_bytes(8, "big") for name, size in blocks.items())
    return ram_word(sum(blocks.values()), MEM_SIZE) + told


def ram_start(blocks: Mapping[str, int]) -> bytes:
    """Return the section with which RAM begins."""
    return section(_START, _RAM_ID, "ram", block_list(blocks) + ram_word(0, EOS))


def ram_pages(name: str, content: bytes) -> bytes:
    """Return the section with all pages of a block."""
    data = bytearray()
    for offset in range(0, len(content), PAGE):
        page = content[offset : offset + PAGE].ljust(PAGE, b"\0")
        block = "" if offset else name
        flags = 0 if block else CONTINUE
        if any(page):
            data += ram_word(offset, flags | DATA, block) + page
        else:
            data += ram_word(offset, flags | ZERO, block) + b"\0"
    return part(_RAM_ID, bytes(data) + ram_word(0, EOS))


def field(
    name: str, size: int, count: int = 1, kind: str = "uint64", **more: Any
) -> dict[str, Any]:
    """Return the description of a field."""
    array = {"array_len": count} if count > 1 else {}
    return {"name": name, "type": kind, "size": size, **array, **more}


def description(devices: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the section that describes all devices."""
    text = json.dumps({"page_size": PAGE, "devices": list(devices)}).encode()
    return b"\x06" + len(text).to_bytes(4, "big") + text


CPU = {
    "name": "cpu",
    "instance_id": 0,
    "vmsd_name": "cpu",
    "version": 1,
    "fields": [
        field("env.gpr", 8, 32),
        field("env.pc", 8),
        field("env.misa_mxl", 4),
        field("env.mstatus", 8),
        field("env.satp", 8),
    ],
}


def cpu_state(pc: int = 0x80000000, satp: int = 0) -> bytes:
    """Return what the vCPU says: x1 is 1, x2 is 2, and so on."""
    gprs = b"".join(number.to_bytes(8, "big") for number in range(32))
    control = pc.to_bytes(8, "big") + (2).to_bytes(4, "big")
    return gprs + control + bytes(8) + satp.to_bytes(8, "big")


def make_migration(content: bytes, *, satp: int = 0) -> bytes:
    """Return the stream of a RISC-V machine `virt` whose RAM, from 0x80000000 on, is `content`."""
    size = -(-len(content) // PAGE) * PAGE
    return (
        HEAD
        + configuration("virt")
        + ram_start({RAM_NAME: size})
        + ram_pages(RAM_NAME, content)
        + section(_FULL, 3, "cpu", cpu_state(satp=satp))
        + EOF
        + description([CPU])
    )


def make_mapped(content: bytes, *, bitmap: bytes = b"", **told: int) -> bytes:
    """Return such a stream by the capability mapped-ram: each page that is not zero at its place.

    Args:
        content: Of RAM.
        bitmap: Instead of that of the pages.
        told: `version`, `page_size`, `bitmap_place` or `pages_place`, instead of what is right.
    """
    size = -(-len(content) // PAGE) * PAGE
    pages = range(size // PAGE)
    stored = sum(any(content[page * PAGE :][:PAGE]) << page for page in pages)
    bitmap = bitmap or stored.to_bytes(-(-len(pages) // 64) * 8, "little")
    head, tail = around_mapped(size, **{"pages_place": 2 * PAGE, **told})
    return (head + bitmap).ljust(2 * PAGE, b"\0") + content.ljust(size, b"\0") + tail


def around_mapped(size: int, **told: int) -> tuple[bytes, bytes]:
    """Return what stands before the bitmap of such a stream, and behind its pages.

    Args:
        size: Of RAM, in bytes.
        told: As `make_mapped` has it; `pages_place` is needed.
    """
    capabilities = (1).to_bytes(4, "big") + name_of("mapped-ram")
    head = HEAD + configuration("virt", subsection("configuration/capabilities", capabilities))
    head += section(_START, _RAM_ID, "ram", block_list({RAM_NAME: size}))[:-5]
    right = {"version": 1, "page_size": PAGE, "bitmap_place": len(head) + 28, "pages_place": 0}
    for (name, number), width in zip((right | told).items(), (4, 8, 8, 8), strict=True):
        assert name in right
        head += number.to_bytes(width, "big")
    data = ram_word(0, EOS) + footer(_RAM_ID)
    data += part(_RAM_ID, ram_word(0, 0x200) + ram_word(0, EOS))
    return head, data + section(_FULL, 3, "cpu", cpu_state()) + EOF + description([CPU])
