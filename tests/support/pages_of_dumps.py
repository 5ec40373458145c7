"""Which pages are in a dump, read by others' code and `struct` alone."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from elftools.elf.elffile import ELFFile

_PAGE_SIZES = (4096, 65536)
_BLOCK_SIZE_AT = (416, 428)
"""In the header of a target of 32 and of 64 bits: block size, blocks of sub header and bitmaps."""
_VERSION_AT = 8
"""Its lowest byte, of a little-endian target."""
_FLATTENED_HEADER_SIZE = 4096
_RECORD = struct.Struct(">qq")
"""Of a flattened stream: where its bytes belong in the file, and how many there are."""


def bitmaps_of(dump: Path) -> tuple[set[int], set[int]]:
    """Return the pages of both bitmaps of a raw kdump."""
    return _bitmaps(dump.read_bytes())


def _bitmaps(content: bytes | bytearray) -> tuple[set[int], set[int]]:
    start, end = _place_of_bitmaps(content)
    half = (end - start) // 2
    first, second = (
        np.frombuffer(content, np.uint8, half, start + index * half) for index in range(2)
    )
    return _set_bits(first), _set_bits(second)


def _place_of_bitmaps(content: bytes | bytearray) -> tuple[int, int]:
    assert content[:8] == b"KDUMP   "
    block_size, sub_header, blocks = next(
        fields
        for order in "<>"
        for at in _BLOCK_SIZE_AT
        if (fields := struct.unpack_from(f"{order}iII", content, at))[0] in _PAGE_SIZES
    )
    start = (1 + sub_header) * block_size
    return start, start + blocks * block_size


def bitmaps_by_makedumpfile(
    makedumpfile: Sequence[str], dump: Path, level: int
) -> tuple[set[int], set[int]]:
    """Return the pages of both bitmaps of what makedumpfile would make of a dump.

    It writes its bitmaps before pages, and is not let write any of these.

    Args:
        makedumpfile: How its command line begins.
        dump: An ELF core.
        level: Its dump level.
    """
    argv = [*makedumpfile, "-F", "-d", str(level), str(dump)]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=said) as process,
    ):
        assert process.stdout is not None
        content = _first_bytes(process.stdout)
        process.kill()
        said.seek(0)
        assert content, said.read().decode("utf-8", "replace")
        return _bitmaps(content + bytes(_place_of_bitmaps(content)[1] - len(content)))


def _first_bytes(stream: IO[bytes]) -> bytearray:
    """Rearrange a flattened stream up to what is behind the bitmaps; empty if it ends before."""
    content = bytearray()
    stream.read(_FLATTENED_HEADER_SIZE)
    while True:
        record = stream.read(_RECORD.size)
        if len(record) < _RECORD.size:
            return bytearray()
        offset, size = _RECORD.unpack(record)
        if content and offset >= _place_of_bitmaps(content)[1]:
            return content
        content.extend(bytes(max(offset + size - len(content), 0)))
        content[offset : offset + size] = stream.read(size)


def _set_bits(bits: np.typing.NDArray[np.uint8]) -> set[int]:
    return set(np.unpackbits(bits, bitorder="little").nonzero()[0].tolist())


def pages_of_zeros(dump: Path) -> set[int]:
    """Return the pages of a raw kdump, not made by us without `--exact`, that share one of zeros.

    None of its other pages share anything.
    """
    content = dump.read_bytes()
    _, end = _place_of_bitmaps(content)
    kept = np.array(sorted(_bitmaps(content)[1]))
    order = "<" if content[_VERSION_AT] else ">"
    descriptors = np.frombuffer(content, f"{order}i8", 3 * len(kept), end)
    offsets = descriptors[::3]
    places, counts = np.unique(offsets, return_counts=True)
    (shared,) = places[counts > 1]
    return set(kept[offsets == shared].tolist())


def pages_of_elf(path: Path, page_size: int) -> set[int]:
    """Return the pages of all segments of an ELF core."""
    with path.open("rb") as file:
        loads = [s.header for s in ELFFile(file).iter_segments() if s.header.p_type == "PT_LOAD"]
    return {
        page
        for load in loads
        for page in range(load.p_paddr // page_size, (load.p_paddr + load.p_memsz) // page_size)
    }
