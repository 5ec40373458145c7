"""Tables that are walked by hundreds map what the walk entry by entry finds."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from qemu_dump_ext.architectures import AddressWindow, all_architectures
from qemu_dump_ext.architectures._page_tables import PageTableGeometry, PageTableRoot
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.paging import bulk_walk
from qemu_dump_ext.paging.bulk_walk import BulkWalker, MappedRuns
from qemu_dump_ext.paging.tables import TableReader, collect_mappings, roots_of_vcpus
from qemu_dump_ext.paging.walk import WalkBudget, translate, unmapped_size
from tests.support.fake_kernel import FlatMemory
from tests.unit.paging.test_walk import FOUR_LEVELS, OTHERS, geometry_bits, pointing, put_words

MIB = 1 << 20
PAGE = 4096
MEMORY = [(0, 3 * MIB), (4 * MIB, 8 * MIB)]
(X86_64_ROOT,) = roots_of_vcpus(
    all_architectures()["x86_64"], [Vcpu(0, FOUR_LEVELS | {"cr3": 0x10000})], native=False
)
assert isinstance(X86_64_ROOT, PageTableRoot)
ROOTS = {"x86_64": X86_64_ROOT, **OTHERS}


def pages_of(segments: list[tuple[int, int, int]], size: int) -> set[tuple[int, int]]:
    """Return gva and gpa of each page that has memory."""
    return {
        (gva + offset, gpa + offset)
        for gva, gpa, length in segments
        for offset in range(0, length, size)
        if any(low < gpa + offset + size and gpa + offset < high for low, high in MEMORY)
    }


def rows_of(runs: MappedRuns) -> list[tuple[int, int, int]]:
    return list(zip(runs.gvas.tolist(), runs.gpas.tolist(), runs.sizes.tolist(), strict=True))


def fill(memory: FlatMemory, tables: PageTableGeometry, seed: int, times: int) -> None:
    """Let a chain of tables lead to two last ones: with runs, holes, single pages, other flags.

    Args:
        memory: Gets them.
        tables: The kind.
        seed: Of what they have.
        times: How often each table leads to the next one.
    """
    dice = random.Random(seed)  # noqa: S311
    last = tables.levels[-1]
    leaf, left = geometry_bits(tables, last), last.leaf_masks[0][1]
    size = 1 << last.shift
    told = tables.present.mask | last.leaf_masks[0][0]
    told |= last.present.mask if last.present else 0
    told |= last.large.test.mask if last.large else 0
    flag = next(1 << bit for bit in range(8 * tables.entry_size) if not told >> bit & 1)
    gpa, ways = 0x10000, pointing(tables, 0)
    for depth, entry in enumerate(ways):
        words = [0] * min(tables.levels[depth].entry_count, 64)
        is_last = depth + 1 == len(ways)
        for number, place in enumerate(dice.sample(range(len(words)), times * (1 + is_last))):
            following = gpa + 0x20000 + number % (1 + is_last) * 0x10000
            words[place] = entry | following >> tables.levels[0].address_shift
        put_words(memory, tables, gpa, words)
        gpa += 0x20000
    for table in (gpa, gpa + 0x10000):
        words, place = [], 0
        while len(words) < last.entry_count:
            kind = dice.choice(["run", "run", "hole", "page", "flags"])
            if kind != "run":
                place = dice.randrange(8 * MIB) // size * size
            count = min(dice.randrange(1, 40), last.entry_count - len(words))
            for _ in range(count if kind in {"run", "hole"} else 1):
                bits = flag if kind == "flags" else 0
                words.append(0 if kind == "hole" else place >> left | leaf | bits)
                place += size
        put_words(memory, tables, table, words)


def by_both(name: str, seed: int, times: int) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    root, memory = ROOTS[name], FlatMemory(8 * MIB)
    fill(memory, root.geometry, seed, times)
    reader = TableReader(memory, memory.blocks)
    segments = collect_mappings([root], reader, MEMORY, native=False)
    size = 1 << root.geometry.levels[-1].shift
    expected = pages_of([(one.gva, one.gpa, one.size) for one in segments], size)
    assert len(expected) > 20
    rows = rows_of(BulkWalker(reader, MEMORY).walk(root))
    assert rows == sorted(rows)
    return pages_of(rows, size), expected


@pytest.mark.parametrize("batch", [1, 1 << 18])
@pytest.mark.parametrize("name", ROOTS)
def test_it_finds_what_the_walk_entry_by_entry_finds(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bulk_walk, "_BATCH_SIZE", batch)
    found, expected = by_both(name, 3, times=1)
    assert found == expected


@pytest.mark.parametrize("name", ROOTS)
def test_of_tables_at_many_places_two_are_enough(name: str):
    found, expected = by_both(name, 4, times=2)
    assert found <= expected
    for distances in (1, 2):
        assert _mapped_with(distances, found) == _mapped_with(distances, expected)


def _mapped_with(distances: int, pages: set[tuple[int, int]]) -> set[int]:
    counts = Counter(gpa for _, gpa in pages)
    return {gpa for gpa, count in counts.items() if count >= distances}


def test_an_address_that_overflows_into_flags_begins_anew():
    root, memory = ROOTS["x86_64"], FlatMemory(8 * MIB)
    for level in range(3):
        memory.put_entries(0x10000 + (level << 12), {0: 0x10000 + (level + 1 << 12) | 1})
    memory.put_entries(0x13000, {5: (1 << 52) - PAGE | 1, 6: 1 << 52 | 1, 7: 1 << 52 | PAGE | 1})
    rows = rows_of(BulkWalker(TableReader(memory, memory.blocks), MEMORY).walk(root))
    assert rows == [(6 * PAGE, 0, 2 * PAGE)]


@pytest.mark.parametrize(
    ("budget", "what"), [(WalkBudget(tables=1), "tables"), (WalkBudget(runs=1), "ranges")]
)
def test_what_hostile_tables_may_cost_is_bounded(budget: WalkBudget, what: str):
    root, memory = ROOTS["x86_64"], FlatMemory(8 * MIB)
    fill(memory, root.geometry, 0, times=1)
    walker = BulkWalker(TableReader(memory, memory.blocks), MEMORY, budget)
    with pytest.raises(RequestError, match=f"more {what}"):
        walker.walk(root)


def test_a_way_of_many_turns_to_nothing_ends_at_once():
    """Every table leads to the next one 512 times, and the last one to nothing."""
    root, memory = ROOTS["x86_64"], FlatMemory(8 * MIB)
    for level in range(3):
        at = 0x10000 + (level << 12)
        memory.put_entries(at, dict.fromkeys(range(512), at + PAGE | 1))
    memory.put_entries(0x13000, {3: 0x40000001})
    walker = BulkWalker(TableReader(memory, memory.blocks), MEMORY, WalkBudget(tables=8))
    assert rows_of(walker.walk(root)) == []


def test_tables_of_another_root_that_are_known_are_not_looked_at_again():
    root, memory = ROOTS["x86_64"], FlatMemory(8 * MIB)
    fill(memory, root.geometry, 0, times=1)
    memory.put_entries(0x200000, {7: 0x30000 | 1, 9: 0x201000 | 1})
    walker = BulkWalker(TableReader(memory, memory.blocks), MEMORY)
    walker.walk(root)
    known = list(walker.tables)
    walker.find_tables(replace(root, gpa=0x200000))
    assert walker.tables[len(known) :] == [(0x200000, 0x201000), (0x201000, 0x202000)]


@pytest.mark.parametrize("name", ROOTS)
def test_what_is_not_mapped_is_told_together(name: str):
    root, memory = ROOTS[name], FlatMemory(8 * MIB)
    fill(memory, root.geometry, 5, times=1)
    reader = TableReader(memory, memory.blocks)
    last = root.geometry.levels[-1]
    page, size = 1 << last.shift, last.entry_count << last.shift
    first, _, _ = rows_of(BulkWalker(reader, [(0, 1 << 40)]).walk(root))[0]
    start, holes, pages = first & -size, 0, 0
    for gva in range(start, start + size, page):
        hole = unmapped_size(root, reader, gva + 8, start + size - gva)
        if translate(root, reader, gva) is not None:
            assert hole == 0
            continue
        assert hole % page == page - 8
        inside = range(gva, gva + 8 + hole, page)
        assert not any(translate(root, reader, one) for one in inside)
        behind = gva + 8 + hole
        assert behind == start + size or translate(root, reader, behind) is not None
        holes, pages = holes + 1, pages + len(inside)
    # There, an entry of zeros maps.
    assert pages > holes > 0 or name.startswith("s390x")


def test_what_a_window_does_not_map_is_told_together():
    window = AddressWindow(gva=0x4000, gpa=0, size=0x2000)
    asked = (0x1000, 0x3000, 0x4000, 0x5FFF, 0x6000)
    nothing = [unmapped_size(window, lambda _gpa, size: bytes(size), gva, 0x2000) for gva in asked]
    assert nothing == [0x2000, 0x1000, 0, 0, 0x2000]
