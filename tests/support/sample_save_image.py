"""libvirt's save images made by hand, and what the programs make that libvirt packs them with.

Laid out as those of libvirt 9.0 are.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Mapping
from typing import Literal

import zstandard

MAGIC = b"LibvirtQemudSave"
UNFINISHED = b"LibvirtQemudPart"
XML = b"<domain type='qemu'><name>web1</name><uuid>1-2</uuid><!-- a note --></domain>"
NUMBERS = {"": 0, "gzip": 1, "bzip2": 2, "xz": 3, "lzop": 4, "zstd": 5, "sparse": 6}

PACKINGS: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
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
