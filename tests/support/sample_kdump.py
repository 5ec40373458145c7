"""Write and read small kdump-compressed images by `struct` alone, apart from the package."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HEADERS = {8: "8si390s6xQQ" + "IiiII4Ii", 4: "8si390s2xII" + "IiiII4Ii"}
SUB_HEADERS = {
    (8, False): "QiiQQ" + "QQ" * 3 + "QQQ",
    (4, False): "IiiII" + "4xQI" * 3 + "4xQQQ",
    (4, True): "IiiII" + "QI" * 3 + "QQQ",
}
BLOCK = 4096
ZERO = bytes(BLOCK)
FLAT_HEAD = struct.pack(">16sqq4064x", b"makedumpfile", 1, 1)
FLAT_END = struct.pack(">qq", -1, -1)


@dataclass
class SampleKdump:
    """An image, and where its parts are."""

    data: bytearray
    bitmaps: int
    bitmap_size: int
    descriptors: int
    page_data: int


def note(name: bytes, note_type: int, descriptor: bytes, order: str = "<") -> bytes:
    """Return one note."""
    head = struct.pack(f"{order}III", len(name) + 1, len(descriptor), note_type)
    return (
        head
        + (name + b"\0").ljust((len(name) + 4) // 4 * 4, b"\0")
        + descriptor
        + bytes(-len(descriptor) % 4)
    )


def prstatus(pid: int, order: str = "<") -> bytes:
    """Return the NT_PRSTATUS note of an x86-64 vCPU."""
    return note(b"CORE", 1, struct.pack(f"{order}32xI300x", pid), order)


def make_kdump(
    pages: dict[int, bytes],
    *,
    order: str = "<",
    word: int = 8,
    packed: bool = False,
    compress: Callable[[bytes], bytes] = lambda page: zlib.compress(page, 1),
    flag: int = 1,
    vmcoreinfo: bytes = b"",
    status: int = 1,
    nr_cpus: int = 1,
    max_mapnr: int | None = None,
    version: int = 6,
    share: bool = False,
) -> SampleKdump:
    """Lay out what QEMU would write for these pages (page frame number: content).

    With `share`, pages of the same content have the same data, which QEMU does for zeros alone.
    """
    mapnr = max(pages) + 1 if max_mapnr is None else max_mapnr
    bitmap_size = -(-(mapnr + 7) // 8 // BLOCK) * BLOCK or BLOCK
    bitmap = bytearray(bitmap_size)
    for pfn in pages:
        bitmap[pfn // 8] |= 1 << pfn % 8
    sub_format = order + SUB_HEADERS[word, packed and word == 4]
    sub_size = struct.calcsize(sub_format)
    cpus = b"".join(prstatus(number + 1, order) for number in range(nr_cpus))
    notes = cpus + (note(b"VMCOREINFO", 0, vmcoreinfo, order) if vmcoreinfo else b"")
    note_at = BLOCK + sub_size
    info_at = note_at + len(cpus) + 12 + 12 if vmcoreinfo else 0
    head = struct.pack(
        order + HEADERS[word],
        *(b"KDUMP   ", version, b"Linux".ljust(65, b"\0") + b"host".ljust(65, b"\0"), 0, 0),
        *(status, BLOCK, 1, 2 * bitmap_size // BLOCK, min(mapnr, 0xFFFFFFFF), 0, 0, 0, 0, nr_cpus),
    )
    sub = struct.pack(
        sub_format,
        *(0x1000000, 1, 0, 0, 0, info_at, len(vmcoreinfo), note_at, len(notes), 0, 0),
        *(0, 0, mapnr),
    )
    assert len(sub) + len(notes) <= BLOCK
    data = bytearray(head.ljust(BLOCK, b"\0") + (sub + notes).ljust(BLOCK, b"\0") + 2 * bitmap)
    descriptors = len(data)
    page_data = descriptors + 24 * len(pages)
    body = bytearray(ZERO)
    places: dict[bytes, int] = {}
    for _, page in sorted(pages.items()):
        place, stored, flags = page_data + len(body), compress(page), flag
        if len(stored) >= BLOCK:
            stored, flags = page, 0
        if page == ZERO:
            place, stored, flags = page_data, ZERO, 0
        elif share and page in places:
            place = places[page]
        else:
            places[page] = place
            body += stored
        data += struct.pack(f"{order}qIIQ", place, len(stored), flags, 0)
    return SampleKdump(data + body, 2 * BLOCK, bitmap_size, descriptors, page_data)


def flatten(data: bytes | bytearray, *, chunk: int = 3000, in_order: bool = False) -> bytes:
    """Return `data` as a flattened stream, second half first or in order."""
    starts = list(range(0, len(data), chunk))
    first = 0 if in_order else len(starts) // 2
    chunks = starts[first:] + starts[:first]
    parts = (data[start : start + chunk] for start in chunks)
    return (
        FLAT_HEAD
        + b"".join(
            struct.pack(">qq", start, len(part)) + part
            for start, part in zip(chunks, parts, strict=True)
        )
        + FLAT_END
    )


def unflatten(stream: bytes) -> bytearray:
    """Return the image inside a flattened stream."""
    image, position = bytearray(), 4096
    while (head := struct.unpack_from(">qq", stream, position)) != (-1, -1):
        offset, size = head
        image.extend(bytes(max(0, offset + size - len(image))))
        image[offset : offset + size] = stream[position + 16 : position + 16 + size]
        position += 16 + size
    return image


def read_kdump(image: bytes, order: str, word: int) -> Iterator[tuple[int, bytes]]:
    """Yield (gpa, page) of a zlib kdump as QEMU writes it."""
    start = 428 if word == 8 else 416
    block, sub_blocks, bitmap_blocks = struct.unpack_from(f"{order}iiI", image, start)
    bitmap_at = block * (1 + sub_blocks + bitmap_blocks // 2)
    descriptor_at = block * (1 + sub_blocks + bitmap_blocks)
    bitmap = image[bitmap_at:descriptor_at]
    for match in re.finditer(rb"[^\0]", bitmap, re.DOTALL):
        for pfn in range(8 * match.start(), 8 * match.end()):
            if bitmap[pfn // 8] >> pfn % 8 & 1:
                offset, size, flags, _ = struct.unpack_from(f"{order}qIIQ", image, descriptor_at)
                stored = image[offset : offset + size]
                yield pfn * block, zlib.decompress(stored) if flags else bytes(stored)
                descriptor_at += 24
