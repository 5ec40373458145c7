"""Hostile tables end in bounded time and memory; geometry is checked against numbers by hand."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable

import pytest

from qemu_dump_ext.architectures import all_architectures, loongarch64, s390x
from qemu_dump_ext.architectures._arm_tables import long_tables, short_tables
from qemu_dump_ext.architectures._declaration import Architecture
from qemu_dump_ext.architectures._page_tables import (
    PageTableGeometry,
    PageTableRoot,
    TableLevel,
    ones_above,
)
from qemu_dump_ext.architectures._powerpc_tables import radix_tables
from qemu_dump_ext.architectures._riscv_tables import riscv_tables
from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.paging.segments import Segment
from qemu_dump_ext.paging.tables import TableReader, collect_mappings, roots_of_vcpus
from qemu_dump_ext.paging.walk import WalkBudget, _Walk, translate
from tests.support.fake_kernel import FlatMemory

X86_64: Architecture = all_architectures()["x86_64"]
MIB = 1 << 20
FOUR_LEVELS = {"cr0": 1 << 31, "cr3": 0x1000, "cr4": 0x20, "efer": 0x500}
FIVE_LEVELS = FOUR_LEVELS | {"cr4": 0x1020}


def collect(
    memory: FlatMemory,
    registers: dict[str, int],
    *,
    native: bool,
    budget: WalkBudget | None = None,
) -> list[Segment]:
    return collect_mappings(
        roots_of_vcpus(X86_64, [Vcpu(0, registers)], native=native),
        TableReader(memory, memory.blocks),
        [(block.gpa, block.end) for block in memory.blocks],
        native=native,
        budget=budget,
    )


def self_map(memory: FlatMemory) -> None:
    memory.put_entries(0x1000, dict.fromkeys(range(512), 0x1001))


def garbage(memory: FlatMemory) -> None:
    memory.data[:] = random.Random(1).randbytes(len(memory.data))  # noqa: S311


def garbage_within_memory(memory: FlatMemory) -> None:
    pick = random.Random(2)  # noqa: S311
    words = [pick.randrange(len(memory.data)) & ~0xFFE | 1 for _ in range(len(memory.data) // 8)]
    memory.data[:] = struct.pack(f"<{len(words)}Q", *words)


def all_ones(memory: FlatMemory) -> None:
    memory.data[:] = b"\xff" * len(memory.data)


def long_way_to_nothing(memory: FlatMemory) -> None:
    # Every table leads to 512 times the next one, and the last one to nothing.
    for level in range(1, 5):
        memory.put_entries(level << 12, dict.fromkeys(range(512), (level + 1) << 12 | 1))
    memory.put_entries(5 << 12, {3: 0x40000001})


ROOT = 0x10000
"""Of all but x86; aligned for every table, the largest of which is 64 KiB."""
OTHERS: dict[str, PageTableRoot] = {
    "aarch64-4k": PageTableRoot(long_tables(12, 48, above=0), ROOT),
    "aarch64-16k": PageTableRoot(long_tables(14, 48, above=0), ROOT),
    "aarch64-64k": PageTableRoot(long_tables(16, 52, above=0), ROOT),
    "arm-long": PageTableRoot(long_tables(12, 32, above=0, address_bits=40), ROOT),
    "arm-short": PageTableRoot(short_tables(0), ROOT),
    "riscv-sv32": PageTableRoot(riscv_tables(32), ROOT),
    "riscv-sv57": PageTableRoot(riscv_tables(57), ROOT),
    "s390x-region-1": PageTableRoot(s390x.page_tables(3, 4), ROOT, exchanged=(0x30000, 0x2000)),
    "s390x-segment": PageTableRoot(s390x.page_tables(0, 4), ROOT),
    "ppc64-4k": PageTableRoot(radix_tables(12), ROOT),
    "ppc64-64k": PageTableRoot(radix_tables(16), ROOT),
}


def tables_of_loongarch(pwcl: int, pwch: int) -> PageTableRoot:
    tables = loongarch64.page_tables(pwcl, pwch, kernel_half=True)
    assert tables is not None
    return PageTableRoot(tables, ROOT)


OTHERS["loongarch64-16k"] = tables_of_loongarch(0x5E56E, 0x2E4)
OTHERS["loongarch64-4k"] = tables_of_loongarch(
    9 << 25 | 30 << 20 | 9 << 15 | 21 << 10 | 9 << 5 | 12, 9 << 6 | 39
)


def pointing(tables: PageTableGeometry, gpa: int) -> list[int]:
    """Return, for each level but the last, an entry that leads to the table at `gpa`."""
    return [
        gpa >> level.address_shift | (geometry_bits(tables, level)) for level in tables.levels[:-1]
    ]


def geometry_bits(tables: PageTableGeometry, level: TableLevel) -> int:
    tests = [test for test in (tables.present, level.present) if test is not None]
    bits = 0
    for test in tests:
        bits |= test.mask & -test.mask if test.wanted is None else test.wanted
    leaf = level.leaf
    if leaf is not None and leaf.wanted is not None and bits & leaf.mask == leaf.wanted:
        bits |= leaf.mask & ~leaf.wanted
    return bits


def put_words(memory: FlatMemory, tables: PageTableGeometry, gpa: int, words: list[int]) -> None:
    order = "<" if tables.byte_order == "little" else ">"
    code = {4: "I", 8: "Q"}[tables.entry_size]
    memory.put(gpa, struct.pack(f"{order}{len(words)}{code}", *words))


def all_lead_to_the_root(memory: FlatMemory, tables: PageTableGeometry) -> None:
    (first, *_) = pointing(tables, ROOT)
    size = tables.entry_size
    put_words(memory, tables, 0, [first] * (len(memory.data) // size))


def all_outside_memory(memory: FlatMemory, tables: PageTableGeometry) -> None:
    (first, *_) = pointing(tables, 0x7000000)
    put_words(memory, tables, 0, [first] * (len(memory.data) // tables.entry_size))


def random_bytes(memory: FlatMemory, _tables: PageTableGeometry) -> None:
    garbage(memory)


def random_entries(memory: FlatMemory, tables: PageTableGeometry) -> None:
    pick = random.Random(3)  # noqa: S311
    known = pointing(tables, 0)
    left = tables.levels[0].address_shift
    words = [
        pick.choice(known) | (pick.randrange(len(memory.data)) & ~0xFFFF) >> left
        for _ in range(len(memory.data) // tables.entry_size)
    ]
    put_words(memory, tables, 0, words)


def every_bit(memory: FlatMemory, _tables: PageTableGeometry) -> None:
    all_ones(memory)


@pytest.mark.parametrize(
    "fill", [all_lead_to_the_root, all_outside_memory, random_bytes, random_entries, every_bit]
)
@pytest.mark.parametrize("name", OTHERS)
def test_hostile_tables_of_others_end_soon(
    fill: Callable[[FlatMemory, PageTableGeometry], None], name: str
):
    memory = FlatMemory(8 * MIB)
    root = OTHERS[name]
    fill(memory, root.geometry)
    reader = TableReader(memory, memory.blocks)
    started = time.process_time()
    try:
        found = collect_mappings(
            [root],
            reader,
            [(0, 8 * MIB)],
            native=False,
            budget=WalkBudget(tables=1 << 12, runs=1 << 14),
        )
    except RequestError as error:
        assert "more" in error.message  # noqa: PT017
        assert error.hint == "dump without -p"  # noqa: PT017
        assert fill is not all_outside_memory
    else:
        assert len(found) < 1 << 16
        if fill is all_outside_memory:
            assert found == []
        for segment in found[:: max(1, len(found) // 50)]:
            assert translate(root, reader, segment.gva)[0] == segment.gpa  # type: ignore[index]
    assert time.process_time() - started < 20


@pytest.mark.parametrize("name", OTHERS)
def test_an_entry_that_leads_on_is_followed(name: str):
    """So that the hostile tables are walked at all."""
    memory = FlatMemory(8 * MIB)
    root = OTHERS[name]
    tables = root.geometry
    gpa = ROOT
    for entry in pointing(tables, 0):
        following = gpa + 0x20000
        put_words(memory, tables, gpa, [entry | following >> tables.levels[0].address_shift])
        gpa = following
    last = tables.levels[-1]
    page = 0x400000 >> last.leaf_masks[0][1] | geometry_bits(tables, last)
    put_words(memory, tables, gpa, [page])
    (found,) = collect_mappings(
        [root], TableReader(memory, memory.blocks), [(0, 8 * MIB)], native=False
    )[:1]
    assert found.gpa == 0x400000


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("registers", [FOUR_LEVELS, FIVE_LEVELS], ids=["4", "5"])
@pytest.mark.parametrize(
    "fill", [self_map, garbage, garbage_within_memory, all_ones, long_way_to_nothing]
)
def test_hostile_tables_end_soon(
    fill: Callable[[FlatMemory], None], registers: dict[str, int], native: bool
):
    memory = FlatMemory(8 * MIB)
    fill(memory)
    started = time.process_time()
    try:
        budget = WalkBudget(tables=1 << 15, runs=1 << 16)
        found = collect(memory, registers, native=native, budget=budget)
    except RequestError as error:
        assert "more" in error.message  # noqa: PT017
        assert error.hint == "dump without -p"  # noqa: PT017
    else:
        assert fill not in {self_map, garbage_within_memory}
        assert len(found) < 1 << 20
    assert time.process_time() - started < 20


def test_a_table_of_which_all_was_found_before_is_not_empty():
    memory = FlatMemory(8 * MIB)
    # Two roots share what they map at 0; the second one has the same, by its own table, elsewhere.
    memory.put_entries(0x1000, {0: 0x4000 | 1})
    memory.put_entries(0x2000, {0: 0x3000 | 1, 1: 0x3000 | 1})
    memory.put_entries(0x3000, {0: 0x5000 | 1})
    memory.put_entries(0x4000, {0: 0x5000 | 1})
    memory.put_entries(0x5000, {0: 0x6000 | 1})
    memory.put_entries(0x6000, {0: 0x700000 | 1})
    roots = roots_of_vcpus(
        X86_64, [Vcpu(n, FOUR_LEVELS | {"cr3": n << 12}) for n in (1, 2)], native=False
    )
    reader = TableReader(memory, memory.blocks)
    assert collect_mappings(roots, reader, [(0, 8 * MIB)], native=False) == [
        Segment(0, 0x700000, 0x1000),
        Segment(1 << 39, 0x700000, 0x1000),
    ]


def test_the_number_of_tables_is_bounded_even_if_they_map_nothing():
    memory = FlatMemory(8 * MIB)
    memory.put_entries(0x1000, {index: 0x10000 + (index << 12) | 1 for index in range(512)})
    with pytest.raises(RequestError, match="more tables"):
        collect(memory, FOUR_LEVELS, native=False, budget=WalkBudget(tables=500, runs=500))
    assert collect(memory, FOUR_LEVELS, native=False, budget=WalkBudget(513, 0)) == []


def test_the_usual_budget_ends_soon():
    memory = FlatMemory(8 * MIB)
    self_map(memory)
    started = time.process_time()
    with pytest.raises(RequestError):
        collect(memory, FOUR_LEVELS, native=True)
    assert time.process_time() - started < 60


def test_a_register_that_no_source_gave_is_named():
    registers = {name: value for name, value in FOUR_LEVELS.items() if name != "cr3"}
    with pytest.raises(SourceError, match="vCPU 0: no source gives 'cr3'"):
        collect(FlatMemory(MIB), registers, native=False)


def put_chain(memory: FlatMemory, *indexes: int) -> None:
    for number, index in enumerate(indexes, 1):
        memory.put_entries(number << 12, {index: (number + 1) << 12 | 1})


def test_addresses_of_both_halves_and_the_flags_of_entries():
    memory = FlatMemory(8 * MIB)
    put_chain(memory, 255, 511, 511)
    memory.put_entries(4 << 12, {511: 1 << 63 | 0x7FF << 52 | 0x123000 | 0xE63})
    assert collect(memory, FOUR_LEVELS, native=False) == [
        Segment(0x00007FFFFFFFF000, 0x123000, 0x1000)
    ]
    assert collect(memory, FOUR_LEVELS, native=True) == []  # bit 62 leads out of memory
    memory.put_entries(4 << 12, {511: 1 << 63 | 0x123000 | 0xE63})
    assert collect(memory, FOUR_LEVELS, native=True) == [
        Segment(0xFFFF7FFFFFFFF000, 0x123000, 0x1000)
    ]


@pytest.mark.parametrize(
    ("gva", "expected"),
    [
        (0xFFFF888000345678, (0x345678, 0x200000 - 0x145678)),
        (0x0000888000345678, None),  # not canonical
        (0xFFFF888000545678, None),
        (-1, None),
        (1 << 70, None),
    ],
)
def test_translate(gva: int, expected: tuple[int, int] | None):
    memory = FlatMemory(8 * MIB)
    put_chain(memory, 273)
    memory.put_entries(2 << 12, {0: 3 << 12 | 1})
    memory.put_entries(3 << 12, {1: 0x200081})
    assert X86_64.page_table_roots is not None
    (root,) = X86_64.page_table_roots(FOUR_LEVELS, False)
    assert translate(root, TableReader(memory, memory.blocks), gva) == expected


@pytest.mark.parametrize(
    ("granule", "va_bits", "shifts", "top_entries"),
    [
        (12, 48, [39, 30, 21, 12], 512),
        (12, 39, [30, 21, 12], 512),
        (12, 52, [48, 39, 30, 21, 12], 16),
        (14, 47, [36, 25, 14], 2048),
        (14, 48, [47, 36, 25, 14], 2),
        (16, 42, [29, 16], 8192),
        (16, 48, [42, 29, 16], 64),
        (16, 52, [42, 29, 16], 1024),
    ],
)
def test_geometry_of_arm64(granule: int, va_bits: int, shifts: list[int], top_entries: int):
    """Numbers of the Arm ARM, table of translation granules."""
    tables = long_tables(granule, va_bits, above=0)
    assert [level.shift for level in tables.levels] == shifts
    assert tables.levels[0].entry_count == top_entries
    assert tables.address_bits == va_bits


@pytest.mark.parametrize(("va_bits", "levels"), [(32, 2), (39, 3), (48, 4), (57, 5)])
def test_geometry_of_riscv(va_bits: int, levels: int):
    tables = riscv_tables(va_bits)
    assert (len(tables.levels), tables.address_bits) == (levels, va_bits)


def test_pages_of_arm64():
    memory = FlatMemory(8 * MIB)
    tables = long_tables(12, 39, above=ones_above(39))
    memory.put_entries(0x1000, {0: 0x2003, 5: 0x40000000 | 1})  # a table; a block outside memory
    memory.put_entries(0x2000, {1: 0x200000 | 0x0060000000000701, 2: 0x3003})
    memory.put_entries(0x3000, {7: 0x555003, 8: 0x556003, 9: 0x557001, 10: 0x558002})
    reader = TableReader(memory, memory.blocks)
    root = PageTableRoot(tables, 0x1000)
    base = 0xFFFFFF8000000000
    assert collect_mappings([root], reader, [(0, 8 * MIB)], native=False) == [
        Segment(base + 0x200000, 0x200000, 0x200000),
        Segment(base + 0x407000, 0x555000, 0x2000),  # 9 and 10 are no valid pages
    ]
    assert translate(root, reader, base + 0x408123) == (0x556123, 0xEDD)
    assert translate(root, reader, base + 0x409000) is None


def test_pages_of_riscv64():
    memory = FlatMemory(8 * MIB)
    memory.put_entries(0x1000, {256: 0x2000 >> 2 | 1, 3: 0x2000 >> 2 | 1})
    memory.put_entries(0x2000, {4: 0x400000 >> 2 | 0xEF, 5: 0x3000 >> 2 | 1})
    memory.put_entries(0x3000, {0: 3 << 61 | 0x777000 >> 2 | 0x4B, 1: 0x778000 >> 2 | 1})
    reader = TableReader(memory, memory.blocks)
    found = collect_mappings(
        [PageTableRoot(riscv_tables(39), 0x1000)], reader, [(0, 8 * MIB)], native=False
    )
    assert found == [
        Segment(base + offset, gpa, size)
        for base in (0xC0000000, 0xFFFFFFC000000000)
        for offset, gpa, size in ((0x800000, 0x400000, 0x200000), (0xA00000, 0x777000, 0x1000))
    ]


@pytest.mark.parametrize(("page_shift", "page_at"), [(16, 7 << 16), (12, 7 << 12)])
def test_pages_of_power_radix(page_shift: int, page_at: int):
    """Numbers of the Power ISA, "Radix Tree Translation"; the root has 8192 entries."""
    memory = FlatMemory(8 * MIB)
    valid, leaf, software = 1 << 63, 1 << 62, 0xF << 57

    def put(gpa: int, entries: dict[int, int]) -> None:
        for index, entry in entries.items():
            memory.put(gpa + 8 * index, struct.pack(">Q", entry))

    # A leaf in the root is of a hash table's kernel: not followed.
    put(0x10000, {16: valid | 0x20000 | 9, 4096: valid | 0x20000 | 9, 17: valid | leaf | 0x20000})
    put(0x20000, {3: valid | 0x21000 | 9, 4: 0x21000 | 9})
    put(0x21000, {5: valid | 0x22000 | 5, 6: valid | leaf | software | 0x40018E})
    put(0x22000, {7: valid | leaf | software | 0x12018E, 8: valid | 0x13018E, 9: leaf | 0x14018E})
    root = PageTableRoot(radix_tables(page_shift), 0x10000)
    found = collect_mappings(
        [root], TableReader(memory, memory.blocks), [(0, 8 * MIB)], native=False
    )
    assert found == [
        Segment(base + (3 << 30) + offset, gpa, size)
        for base in (0xC000080000000000, 0xC008000000000000)
        for offset, gpa, size in (
            ((5 << 21) + page_at, 0x120000, 1 << page_shift),
            (6 << 21, 0x400000, 2 * MIB),
        )
    ]


def test_pages_of_loongarch64():
    """Three levels of 11 bits above pages of 16 KiB, as Linux has them; by its registers."""
    memory = FlatMemory(72 * MIB)
    memory.put_entries(0x10000, {0: 0x14000, 2047: 0x14000})
    # Of a huge page, bit 12 is a flag.
    memory.put_entries(0x14000, {5: 0x18000, 6: 0x2000000 | 1 << 62 | 0x11D3})
    memory.put_entries(0x18000, {7: 1 << 62 | 0x1201D3, 8: 0x1241D2, 9: 0x1250C1})
    registers = dict.fromkeys(("pgdl", "dmw1", "dmw2", "dmw3"), 0) | {
        "crmd": 0xB0,
        "pwcl": 0x5E56E,
        "pwch": 0x2E4,
        "pgdh": 0x10000,
        "dmw0": 0x9000000000000011,
    }
    roots = loongarch64.ARCHITECTURE.page_table_roots
    assert roots is not None
    assert roots(registers | {"crmd": 0xA8}, False) == ()
    found = collect_mappings(
        roots(registers, False),
        TableReader(memory, memory.blocks),
        [(0, 72 * MIB)],
        native=False,
    )
    assert found == [
        Segment(0x9000000000000000, 0, 1 << 48),
        *(
            Segment(base + offset, gpa, size)
            for base in (0xFFFF800000000000, 0xFFFFFFF000000000)
            for offset, gpa, size in (
                ((5 << 25) + (7 << 14), 0x120000, 0x4000),
                ((5 << 25) + (9 << 14), 0x124000, 0x4000),
                (6 << 25, 0x2000000, 32 * MIB),
            )
        ),
    ]


# Entries of a whole table: in one run; with a fault at some place; of which some lead elsewhere.
_FAULTS: dict[str, dict[int, int]] = {
    "none": {},
    "first is missing": {0: 0},
    "last is missing": {511: 0},
    "one is missing": {200: 0},
    "one leads elsewhere": {200: 0x5000 | 1},
    "one has other flags": {200: 0x200000 + 200 * 0x1000 | 0x21},
    "one has a bit above": {511: 1 << 53 | 0x200000 + 511 * 0x1000 | 1},
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("at", [0x200000, 0x500000, 0x700000], ids=hex)
@pytest.mark.parametrize("fault", _FAULTS)
def test_a_table_of_one_run_is_as_its_entries_one_by_one(
    fault: str, at: int, native: bool, monkeypatch: pytest.MonkeyPatch
):
    """From 0x700000 on, it leads out of memory."""
    memory = FlatMemory(8 * MIB)
    put_chain(memory, 256, 0)
    memory.put_entries(3 << 12, {0: 4 << 12 | 1, 1: 5 << 12 | 1})
    for table, gpa in ((4, at), (5, at + 2 * MIB)):  # the second one goes on where the first ends
        memory.put_entries(table << 12, {index: gpa + (index << 12) | 1 for index in range(512)})
    memory.put_entries(4 << 12, _FAULTS[fault])
    found = collect(memory, FOUR_LEVELS, native=native)
    assert found
    monkeypatch.setattr(_Walk, "_is_one_run", lambda *_: False)
    assert collect(memory, FOUR_LEVELS, native=native) == found
