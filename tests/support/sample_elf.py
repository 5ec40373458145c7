"""Write small ELF cores by `struct` alone, apart from the package."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tests.support.sample_kdump import prstatus


@dataclass(frozen=True)
class Load:
    """One PT_LOAD; `memsz` and `offset` default to what `data` says."""

    paddr: int
    data: bytes
    memsz: int | None = None
    vaddr: int | None = None
    offset: int | None = None


def make_elf(
    loads: list[Load],
    *,
    order: str = "<",
    word: int = 8,
    sections_first: bool = True,
    xnum: bool = False,
    notes: bytes | None = None,
) -> bytearray:
    """Lay out an ELF core: as QEMU 7.2 does, or with the program headers first."""
    ehdr_size, phdr_size, shdr_size = (64, 56, 64) if word == 8 else (52, 32, 40)
    letter = "Q" if word == 8 else "I"
    note_bytes = prstatus(1, order) if notes is None else notes
    count = 1 + len(loads)
    sections = 2 if sections_first else int(xnum)
    sections_at = ehdr_size if sections_first else ehdr_size + count * phdr_size
    phdrs_at = ehdr_size + (sections * shdr_size if sections_first else 0)
    notes_at = ehdr_size + count * phdr_size + sections * shdr_size
    memory_at = notes_at + len(note_bytes)
    strings_at = memory_at + sum(len(load.data) for load in loads)
    strings = b"\0.shstrtab\0"
    shdr = f"{order}II{letter * 4}II{letter * 2}"
    headers = [
        struct.pack(shdr, *(0, 0, 0, 0, 0, 0, 0, count if xnum else 0, 0, 0)),
        struct.pack(shdr, *(1, 3, 0, 0, strings_at, len(strings), 0, 0, 0, 0)),
    ][:sections]

    def phdr(kind: int, offset: int, vaddr: int, paddr: int, filesz: int, memsz: int) -> bytes:
        if word == 8:
            return struct.pack(f"{order}II6Q", kind, 0, offset, vaddr, paddr, filesz, memsz, 0)
        return struct.pack(f"{order}8I", kind, offset, vaddr, paddr, filesz, memsz, 0, 0)

    phdrs = [phdr(4, notes_at, 0, 0, len(note_bytes), len(note_bytes))]
    position = memory_at
    for load in loads:
        phdrs.append(
            phdr(
                1,
                position if load.offset is None else load.offset,
                load.paddr if load.vaddr is None else load.vaddr,
                load.paddr,
                len(load.data),
                len(load.data) if load.memsz is None else load.memsz,
            )
        )
        position += len(load.data)
    ident = b"\x7fELF" + bytes([2 if word == 8 else 1, 1 if order == "<" else 2, 1])
    ehdr = struct.pack(
        f"{order}16sHHI{letter * 3}I6H",
        *(ident, 4, 62, 1, 0, phdrs_at, sections_at if sections else 0, 0, ehdr_size, phdr_size),
        *(0xFFFF if xnum else count, shdr_size if sections else 0, sections),
        1 if sections_first else 0,
    )
    parts = [*headers, *phdrs] if sections_first else [*phdrs, *headers]
    memory = b"".join(load.data for load in loads)
    return bytearray(
        ehdr + b"".join(parts) + note_bytes + memory + (strings if sections_first else b"")
    )
