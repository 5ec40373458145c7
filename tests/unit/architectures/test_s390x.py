from __future__ import annotations

import pytest

from qemu_dump_ext.architectures import all_architectures, s390x
from qemu_dump_ext.architectures._declaration import VcpuReadings
from qemu_dump_ext.architectures._page_tables import PageTableRoot
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.paging.tables import kernel_translations
from qemu_dump_ext.registers.merge import merge_readings

S390X = all_architectures()["s390x"]
MERGED, STALE = 0x0704E001 << 32, 0x0704C001 << 32


def merged(**sources: dict[str, int]) -> tuple[int | None, int | None]:
    empty: dict[str, int] = {}
    values = merge_readings(
        S390X,
        VcpuReadings(
            gdb=sources.get("gdb", empty),
            monitor=sources.get("monitor", empty),
            native=sources.get("native", empty),
            hardware_segments=False,
        ),
    )
    return values.get("psw_mask"), values.get("psw_mask_as_stored")


def test_the_stub_has_the_condition_code_and_qemus_note_what_is_stored():
    stub, native = {"psw_mask": MERGED}, {"psw_mask": STALE}
    assert merged(gdb=stub, native=native) == (MERGED, STALE)
    assert merged(monitor=stub, native={"psw_mask_as_stored": STALE}) == (MERGED, STALE)


def test_what_one_source_does_not_tell_the_other_does():
    assert merged(native={"psw_mask": STALE}) == (STALE, STALE)
    assert merged(gdb={"psw_mask": MERGED}) == (MERGED, MERGED)
    assert merged() == (None, None)


# Lines of VMCOREINFO of Debian's kernels 6.1.0-50 and 7.2.13+deb14, and where their tables were.
APART = """SYMBOL(swapper_pg_dir)=3fffff54000
IDENTITYBASE=0
KERNELOFFSET=3fffe3a8000
KERNELOFFPHYS=9a8000
"""
KERNELS = {
    "in-place": ("SYMBOL(swapper_pg_dir)=1290000\nKERNELOFFSET=0\n", 0x1290000),
    "apart": (APART, 0x2554000),
}


@pytest.mark.parametrize("name", KERNELS)
def test_where_the_kernels_tables_are(name: str):
    text, gpa = KERNELS[name]
    roots = kernel_translations(S390X, text.encode(), [RamBlock(0, 1 << 28, "s390.ram", 0)])
    assert {root.gpa for root in roots} == {gpa}


def test_prefixing_exchanges_two_pages():
    tables = s390x.page_tables(0, 4)
    root = PageTableRoot(tables, 0x1000, exchanged=(0x40000, 0x2000))
    assert list(root.parts(0x100000, 0x1000, 0x3000)) == [
        (0x100000, 0x41000, 0x1000),
        (0x101000, 0x2000, 0x2000),
    ]
    assert list(root.parts(0, 0x3F000, 0x4000)) == [
        (0, 0x3F000, 0x1000),
        (0x1000, 0, 0x2000),
        (0x3000, 0x42000, 0x1000),
    ]
