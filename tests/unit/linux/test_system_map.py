from __future__ import annotations

import pytest

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.linux.system_map import functions_at

# As that of a kernel for x86_64, but not sorted, and with functions around what runs later on.
SYSTEM_MAP = """\
0000000000000000 D __per_cpu_start
ffffffff80fff000 T startup_only
ffffffff81001000 t asm_exc_nmi
ffffffff81000000 T _stext
ffffffff81000040 T start_kernel
ffffffff81001080 W weak_function
ffffffff81001090 r not_a_function
ffffffff81002000 T _etext
ffffffff82000000 T _sinittext
ffffffff82000010 t init_only
"""
TEXT = 0xFFFFFFFF81000000


@pytest.fixture
def system_map(tmp_path):
    path = tmp_path / "System.map"
    path.write_text(SYSTEM_MAP)
    return path


def test_program_counters_are_named_in_their_order(system_map):
    counters = [TEXT + 0x1010, TEXT + 0x40, TEXT + 0xFFF, TEXT + 0x1098, TEXT + 0x1000]
    names = ["asm_exc_nmi", "start_kernel", "start_kernel", "weak_function", "asm_exc_nmi"]
    assert functions_at(system_map, b"", counters) == names


@pytest.mark.parametrize(
    "counter",
    [0, 0x401000, TEXT - 1, TEXT + 0x2000, 0xFFFFFFFF82000014, 0xFFFFFFFFC0000000],
    ids=hex,
)
def test_what_is_not_in_the_kernels_text_has_no_name(system_map, counter):
    assert functions_at(system_map, b"", [counter, TEXT + 0x44]) == ["start_kernel"]


def test_offset_of_kaslr_is_taken_off(system_map):
    note = b"OSRELEASE=6.1.0\nKERNELOFFSET=14600000\n"
    assert functions_at(system_map, note, [TEXT + 0x14600044]) == ["start_kernel"]
    assert functions_at(system_map, note, [TEXT + 0x44]) == []


def test_map_without_bounds_names_what_is_behind_its_first_function(tmp_path):
    path = tmp_path / "System.map"
    path.write_text("80100000 t first\n80100100 T second\n")
    assert functions_at(path, b"", [0x800FFFFF, 0x80100000, 0x80200000]) == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "names no function"),
        (b"\x7fELF\0\xff\n", "names no function"),
        (b"ffffffffffffffff B The real System.map is elsewhere\n", "names no function"),
        (b"0000000000000000 D __per_cpu_start\n", "names no function"),
        (b"this is prose\n", "is no System.map"),
    ],
    ids=["empty", "binary", "stub of Debian", "no text", "prose"],
)
def test_file_without_functions_is_refused(tmp_path, content, said):
    path = tmp_path / "System.map"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=said):
        functions_at(path, b"", [TEXT])


def test_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"cannot read .*: Is a directory"):
        functions_at(tmp_path, b"", [TEXT])
