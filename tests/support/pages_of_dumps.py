"""Which pages are in a dump, read by others' code and `struct` alone."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from elftools.elf.elffile import ELFFile

_PAGE_SIZES = (4096, 65536)
_BLOCK_SIZE_AT = (416, 428)
"""In the header of a target of 32 and of 64 bits: block size, blocks of sub header and bitmaps."""


def bitmaps_of(dump: Path) -> tuple[set[int], set[int]]:
    """Return the pages of both bitmaps of a raw kdump."""
    content = dump.read_bytes()
    assert content[:8] == b"KDUMP   "
    block_size, sub_header, blocks = next(
        fields
        for order in "<>"
        for at in _BLOCK_SIZE_AT
        if (fields := struct.unpack_from(f"{order}iII", content, at))[0] in _PAGE_SIZES
    )
    half = blocks // 2 * block_size
    first, second = (
        np.frombuffer(content, np.uint8, half, (1 + sub_header) * block_size + index * half)
        for index in range(2)
    )
    return _set_bits(first), _set_bits(second)


def _set_bits(bits: np.typing.NDArray[np.uint8]) -> set[int]:
    return set(np.unpackbits(bits, bitorder="little").nonzero()[0].tolist())


def pages_of_elf(path: Path, page_size: int) -> set[int]:
    """Return the pages of all segments of an ELF core."""
    with path.open("rb") as file:
        loads = [s.header for s in ELFFile(file).iter_segments() if s.header.p_type == "PT_LOAD"]
    return {
        page
        for load in loads
        for page in range(load.p_paddr // page_size, (load.p_paddr + load.p_memsz) // page_size)
    }
