"""Page tables of a LoongArch kernel, of which VMCOREINFO tells the root and the lowest address."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qemu_dump_ext.architectures import Translation, all_architectures
from qemu_dump_ext.architectures._page_tables import AddressWindow, PageTableRoot

_KERNEL = "SYMBOL(_stext)=9000000000220000\nSYMBOL(swapper_pg_dir)=9000000001b20000\n"


def _translations(vmcoreinfo: bytes) -> Sequence[Translation]:
    translate = all_architectures()["loongarch64"].kernel_page_tables
    assert translate is not None
    return translate(vmcoreinfo, None)


# Linux arch/loongarch/Kconfig: 16KB_3LEVEL, 4KB_3LEVEL, 64KB_2LEVEL, 64KB_3LEVEL.
@pytest.mark.parametrize(
    ("page_size", "lowest", "shifts"),
    [
        (16384, 0xFFFF800082008000, [36, 25, 14]),
        (4096, 0xFFFFFF8082008000, [30, 21, 12]),
        (65536, 0xFFFFFC0082008000, [29, 16]),
        (65536, 0xFF80000082008000, [42, 29, 16]),
    ],
)
def test_the_levels_are_as_many_as_the_lowest_address_needs(page_size, lowest, shifts):
    text = f"{_KERNEL}PAGESIZE={page_size}\nNUMBER(VMALLOC_START)={lowest:#x}\n".encode()
    *windows, root = _translations(text)
    assert all(isinstance(window, AddressWindow) for window in windows)
    assert isinstance(root, PageTableRoot)
    assert root.gpa == 0x1B20000
    assert [level.shift for level in root.geometry.levels] == shifts


@pytest.mark.parametrize(
    "more", ["", "PAGESIZE=16384", "PAGESIZE=5\nNUMBER(VMALLOC_START)=0xffff800000000000"]
)
def test_without_what_tells_of_tables_there_are_the_windows(more):
    text = (_KERNEL + more).encode()
    found = _translations(text)
    assert len(found) == 2
