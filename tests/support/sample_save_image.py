"""libvirt's save images made by hand, and what the programs make that libvirt packs them with.

Laid out as those of libvirt 9.0 are.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Literal

import lzo
import zstandard

MAGIC = b"LibvirtQemudSave"
UNFINISHED = b"LibvirtQemudPart"
XML = b"<domain type='qemu'><name>web1</name><uuid>1-2</uuid><!-- a note --></domain>"
NUMBERS = {"": 0, "gzip": 1, "bzip2": 2, "xz": 3, "lzop": 4, "zstd": 5, "sparse": 6}


def _lzop(data: bytes) -> bytes:
    """As lzop writes it: header, blocks, and an empty block."""
    head = struct.pack(">HHHBBIIIIB", 0x1040, 0x20A0, 0x0940, 1, 5, 3, 0, 0, 0, 0)
    made = b"\x89LZO\0\r\n\x1a\n" + head + struct.pack(">I", zlib.adler32(head))
    for start in range(0, len(data), _LZOP_BLOCK):
        block = data[start : start + _LZOP_BLOCK]
        packed = lzo.compress(block, 1, False)
        sums = [len(block), min(len(packed), len(block)), zlib.adler32(block)]
        if len(packed) < len(block):
            sums.append(zlib.adler32(packed))
        made += struct.pack(f">{len(sums)}I", *sums) + min(packed, block, key=len)
    return made + bytes(4)


_LZOP_BLOCK = 256 << 10
PACKINGS: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzop": _lzop,
    "zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}


def pack(data: bytes, packing: str) -> bytes:
    """Return what a program makes of data; the data itself where it is none of `PACKINGS`."""
    return PACKINGS[packing](data) if packing in PACKINGS else data


def save_header(
    packing: int = 0,
    *,
    magic: bytes = MAGIC,
    version: int = 2,
    xml_size: int = len(XML) + 1,
    byte_order: Literal["little", "big"] = "little",
) -> bytes:
    """Return the fixed header."""
    numbers = (version, xml_size, 1, packing, 0, *(0,) * 14)
    return magic + b"".join(number.to_bytes(4, byte_order) for number in numbers)


def make_save_image(stream: bytes, packing: str = "", *, xml: bytes = XML) -> bytes:
    """Return the image of a stream."""
    header = save_header(NUMBERS[packing], xml_size=len(xml) + 1)
    return header + xml + b"\0" + pack(stream, packing)
