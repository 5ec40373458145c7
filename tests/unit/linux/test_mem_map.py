"""Where struct pages are, by numbers that a hostile kernel tells; real ones: tests/guest."""

from __future__ import annotations

import re

import pytest

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.page_filter import FilterRules
from tests.support.fake_pages import PAGE, SECTIONS, GuestWithPages


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("SIZE(mem_section)", 4097, "mem_section.section_mem_map"),
        ("SIZE(mem_section)", 4104, "mem_section.section_mem_map"),
        ("SIZE(mem_section)", 7, "mem_section.section_mem_map"),
        ("SIZE(mem_section)", -16, "mem_section.section_mem_map"),
        ("OFFSET(mem_section.section_mem_map)", 9, "mem_section.section_mem_map"),
        ("OFFSET(mem_section.section_mem_map)", -1, "mem_section.section_mem_map"),
        ("NUMBER(SECTION_SIZE_BITS)", 12, "NUMBER(SECTION_SIZE_BITS)=12"),
        ("NUMBER(SECTION_SIZE_BITS)", 13, "NUMBER(SECTION_SIZE_BITS)=13"),
        ("NUMBER(SECTION_SIZE_BITS)", 19, "NUMBER(SECTION_SIZE_BITS)=19"),
        ("NUMBER(SECTION_SIZE_BITS)", 64, "NUMBER(SECTION_SIZE_BITS)=64"),
    ],
)
@pytest.mark.parametrize("length", ["", "LENGTH(mem_section)=2048\n"])
def test_numbers_that_make_no_sense_are_an_error(key, value, said, length):
    guest = GuestWithPages()
    text = guest.vmcoreinfo.decode()
    guest.vmcoreinfo = re.sub(f"(?m)^{re.escape(key)}=.*$", f"{key}={value}", text).encode()
    guest.vmcoreinfo += length.encode()
    with pytest.raises(SourceError, match=re.escape(said)):
        guest.pages().excluded(FilterRules(31))


@pytest.mark.parametrize("size", [16, 32, 4096])
def test_numbers_that_may_be_are_taken(size):
    guest = GuestWithPages()
    guest.vmcoreinfo = guest.vmcoreinfo.replace(
        b"SIZE(mem_section)=16\n", f"SIZE(mem_section)={size}\n".encode()
    )
    assert guest.pages().excluded(FilterRules(31)).ranges


def test_struct_pages_that_nobody_can_read_are_an_error():
    guest = GuestWithPages()
    nowhere = 0xFFFFFEBFFE000000
    guest.memory.put_entries(SECTIONS + PAGE, {0: nowhere | 1, 2: nowhere | 1})
    with pytest.raises(SourceError, match="struct pages cannot be read"):
        guest.pages().excluded(FilterRules(31))
