"""Hostile tables end in bounded time and memory; geometry is checked against numbers by hand."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable

import pytest

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.architectures._declaration import Architecture
from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.guest import Vcpu
from qemu_dump_ext.guest_tables import TableReader, collect_mappings
from qemu_dump_ext.memory_mapping import Segment
from qemu_dump_ext.page_table_walk import WalkBudget, translate
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
    found = collect_mappings(
        X86_64,
        [Vcpu(0, registers)],
        TableReader(memory, memory.blocks),
        [(block.gpa, block.end) for block in memory.blocks],
        native=native,
        budget=budget,
    )
    assert found is not None
    return found


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


def test_the_number_of_tables_is_bounded_even_if_they_map_nothing():
    memory = FlatMemory(8 * MIB)
    memory.put_entries(0x1000, {index: 0x10000 + (index << 12) | 1 for index in range(512)})
    with pytest.raises(RequestError, match="more tables"):
        collect(memory, FOUR_LEVELS, native=False, budget=WalkBudget(tables=500, runs=500))
    assert collect(memory, FOUR_LEVELS, native=False, budget=WalkBudget(513, 0)) == []


def test_the_usual_budget_ends_within_half_a_minute():
    memory = FlatMemory(8 * MIB)
    self_map(memory)
    started = time.process_time()
    with pytest.raises(RequestError):
        collect(memory, FOUR_LEVELS, native=True)
    assert time.process_time() - started < 30


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
