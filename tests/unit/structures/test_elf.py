from __future__ import annotations

import pytest

from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.elf import (
    EHDR,
    ELFDATA,
    PN_XNUM,
    PT_LOAD,
    PT_NOTE,
    SHDR,
    elf_abi,
    parse_loads,
    phdr_layout,
)


@pytest.mark.parametrize("byte_order", ["little", "big"])
@pytest.mark.parametrize("word_size", [4, 8])
@pytest.mark.parametrize("extended", [False, True])
def test_loads_are_read_where_their_headers_are_whole(
    byte_order: ByteOrder, word_size: int, *, extended: bool
):
    abi = elf_abi(byte_order, word_size)
    ehdr, phdr, shdr = (layout.bind(abi) for layout in (EHDR, phdr_layout(word_size), SHDR))
    identification = b"\x7fELF" + bytes((word_size // 4, ELFDATA[byte_order]))
    content = ehdr.pack(
        e_ident=identification.ljust(16, b"\0"),
        e_shoff=ehdr.size,
        e_phoff=ehdr.size + shdr.size,
        e_phnum=PN_XNUM if extended else 3,
    )
    content += shdr.pack(sh_info=3)
    content += phdr.pack(p_type=PT_NOTE, p_paddr=7, p_memsz=7)
    content += phdr.pack(p_type=PT_LOAD, p_paddr=0x5000, p_memsz=0x1000)
    content += phdr.pack(p_type=PT_LOAD, p_paddr=0x1000, p_memsz=0x10)
    assert parse_loads(content + b"more") == [(0x1000, 0x1010), (0x5000, 0x6000)]
    assert parse_loads(content[:-1]) is None
    assert parse_loads(content[: ehdr.size + shdr.size - 1]) is None
    assert parse_loads(content[:9]) is None
    assert parse_loads(b"") is None
