"""Write what LiME, AVML and gcore write of a few blocks of memory, by `struct` alone."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache

import snappy

from tests.support.fake_kernel import FlatMemory, plant_kernel
from tests.support.sample_elf import Load, make_elf
from tests.support.sample_kdump import note

RAM_SIZE = 4 << 20
_FRAME = 1 << 16
_CASTAGNOLI = 0x82F63B78


def make_lime(blocks: Mapping[int, bytes], *, reserved: bytes = bytes(8)) -> bytes:
    """Return a file of LiME of content by gpa."""
    return b"".join(
        struct.pack("<IIQQ", 0x4C694D45, 1, gpa, gpa + len(content) - 1) + reserved + content
        for gpa, content in sorted(blocks.items())
    )


def _remainder(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_CASTAGNOLI if byte & 1 else 0)
    return byte


_REMAINDERS = tuple(map(_remainder, range(256)))


@lru_cache(maxsize=4)
def _checksum(data: bytes) -> int:
    """CRC-32C, masked as snappy's framing has it; most of a guest's memory is the same zeros."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _REMAINDERS[(value ^ byte) & 0xFF]
    value ^= 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _chunk(kind: int, data: bytes) -> bytes:
    return bytes([kind]) + len(data).to_bytes(3, "little") + data


def make_avml(blocks: Mapping[int, bytes]) -> bytes:
    """Return a file of AVML, version 2, of content by gpa."""
    parts = []
    for gpa, content in sorted(blocks.items()):
        frames = bytearray(_chunk(0xFF, b"sNaPpY"))
        for start in range(0, len(content), _FRAME):
            plain = content[start : start + _FRAME]
            packed = snappy.compress(plain)
            small = len(packed) < len(plain)
            check = struct.pack("<I", _checksum(plain))
            frames += _chunk(0x00 if small else 0x01, check + (packed if small else plain))
        header = struct.pack("<IIQQQ", 0x4C4D5641, 2, gpa, gpa + len(content) - 1, 0)
        parts.append(header + frames + struct.pack("<Q", len(frames)))
    return b"".join(parts)


def ram_with_kernel(size: int = RAM_SIZE, phys_base: int = 2 << 20) -> bytes:
    """Return RAM of a machine that has it from 0 on, with a kernel in it."""
    memory = FlatMemory(size)
    plant_kernel(memory, phys_base, "6.1.0")
    memory.put(0x5000, b"somewhere in low memory")
    return bytes(memory.data)


def make_qemu_core(ram: bytes, *, parts: int = 1) -> bytes:
    """Return what gcore would write of a QEMU with this RAM, in so many mappings."""
    size = len(ram) // parts
    loads = [Load(0, b"its program" * 1000, vaddr=0x400000)]
    loads += [
        Load(0, ram[at : at + size], vaddr=0x7F0000000000 + at) for at in range(0, len(ram), size)
    ]
    loads.append(Load(0, b"its stack" * 1000, vaddr=0x7FFFFFFF0000))
    return bytes(make_elf(loads, notes=note(b"CORE", 1, bytes(336)) + note(b"CORE", 6, bytes(16))))
