"""The planner's segments, and QEMU's list of mappings found without its scans."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.dump_formats.elf import lay_out
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.paging.segments import NativeMappingList, Segment, overlap_size, unmapped_size
from qemu_dump_ext.plan.plan import GuestSnapshot, make_plan
from qemu_dump_ext.plan.ranges import blocks_within
from qemu_dump_ext.plan.request import DumpRequest, MemoryRange
from qemu_dump_ext.structures.dialect import MENDED, qemu_dialect
from qemu_dump_ext.structures.utsname import UtsName
from tests.support.oracle import elf_facts

_U64 = (1 << 64) - 1


class ScannedList:
    """QEMU's algorithm to the letter, with its scans."""

    def __init__(self) -> None:
        self.elements: list[list[int]] = []
        self.last: list[int] | None = None

    def add(self, gva: int, gpa: int, size: int) -> None:
        for element in [self.last] if self.last else []:
            if self._continues(element, gva, gpa):
                element[2] += size
                return
        for element in self.elements:
            start, virtual, length = element
            if self._continues(element, gva, gpa):
                element[2] += size
                self.last = element
                return
            if gpa + size < start:
                break
            if gpa < start + length:
                if (gva - virtual) & _U64 != (gpa - start) & _U64:
                    continue
                if gva < virtual:
                    element[2] += virtual - gva
                    element[1] = gva
                if (gva + size) & _U64 > (element[1] + element[2]) & _U64:
                    element[2] = (gva + size - element[1]) & _U64
                self.last = element
                return
        self.last = [gpa, gva, size]
        place = next(
            (i for i, element in enumerate(self.elements) if element[0] >= gpa), len(self.elements)
        )
        self.elements.insert(place, self.last)

    @staticmethod
    def _continues(element: list[int], gva: int, gpa: int) -> bool:
        start, virtual, length = element
        return gpa == start + length and gva == (virtual + length) & _U64


# Few pages and few distances, so that everything meets everything.
RUNS = st.lists(
    st.tuples(
        st.integers(0, 40),  # first page
        st.sampled_from([0, 0, 3, 64, (1 << 52) - 24]),  # distance in pages; the last one wraps
        st.integers(1, 9),  # pages
        st.sampled_from([1, 1, 1, 2, 8]),  # size of one
    ),
    max_size=60,
)


@settings(max_examples=600, deadline=None)
@given(RUNS)
def test_native_list_is_the_scanned_one(runs):
    fast, slow = NativeMappingList(), ScannedList()
    for first, distance, count, page in runs:
        gpa, size = first * 4096, page * 4096
        gva = (first + distance) * 4096 & _U64
        fitting = min(count, ((1 << 64) - gva) // size)  # pages do not wrap, what they make may
        if fitting:
            fast.add_run(gva, gpa, fitting * size, size)
        for step in range(fitting):
            slow.add(gva + step * size, gpa + step * size, size)
    assert [(s.gpa, s.gva, s.size) for s in fast.segments()] == [
        tuple(element) for element in slow.elements
    ]


def test_many_elements_of_one_distance_take_no_time():
    mappings = NativeMappingList()
    for vcpu in range(2):
        for index in range(100_000):
            mappings.add_run(index * 0x2000 - 0x1000 * vcpu & _U64, index * 0x2000, 0x1000, 0x1000)
    assert len(mappings.segments()) == 200_000


def test_merging_in_front_of_everything_takes_no_time():
    mappings = NativeMappingList()
    for index in range(30_000):
        mappings.add_run(0x1000 + index * 0x4000, 0x1000 + index * 0x4000, 0x1000, 0x1000)
    for index in range(30_000):
        mappings.add_run(index * 0x4000, index * 0x4000, 0x1000, 0x1000)
    assert mappings.segments()[5] == Segment(5 * 0x4000, 5 * 0x4000 + 0x1000, 0x2000)


ARCHITECTURE = all_architectures()["x86_64"]
REGISTERS = {register.name: 0 for register in ARCHITECTURE.registers} | {"efer": 0x500}


@st.composite
def guests(draw):
    blocks, gpa = [], 0
    for _ in range(draw(st.integers(1, 5))):
        gpa += draw(st.integers(0, 3)) * draw(st.sampled_from([1, 0x800, 0x1000]))
        size = draw(st.integers(1, 5)) * draw(st.sampled_from([0x10, 0x1000, 0x1000]))
        blocks.append(RamBlock(gpa, size, "ram", gpa))
        gpa += size
    mappings = [
        Segment(draw(st.integers(0, 40)) * 0x1000, first * 0x1000, count * 0x1000)
        for first, count in draw(
            st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), max_size=12)
        )
    ]
    bounds = draw(
        st.none() | st.builds(MemoryRange, st.integers(0, gpa), st.integers(1, gpa), st.booleans())
    )
    return blocks, mappings, bounds


def content_of(gpa: int, size: int) -> bytes:
    return bytes((gpa + i) * 167 + ((gpa + i) >> 8) * 13 & 0xFF for i in range(size))


@settings(max_examples=300, deadline=None)
@given(guests(), st.booleans(), st.booleans())
def test_every_byte_of_a_segment_is_the_guests(tmp_path_factory, guest, paging, exact):
    blocks, mappings, bounds = guest
    snapshot = GuestSnapshot(
        ARCHITECTURE, blocks, [Vcpu(0, REGISTERS)], b"", UtsName(), mappings=mappings
    )
    dialect = qemu_dialect((7, 2, 22)) if exact else MENDED
    request = DumpRequest(paging=paging, memory_range=bounds)
    try:
        plan = make_plan(snapshot, dialect, request)
    except RequestError:
        assert bounds is not None
        assert not any(b.gpa < bounds.end and bounds.begin < b.end for b in blocks)
        return
    layout = lay_out(plan)
    memory = b"".join(content_of(block.gpa, block.size) for block in plan.ram_blocks)
    path = tmp_path_factory.getbasetemp() / "planned"
    path.write_bytes(layout.head + memory + layout.tail)
    facts = elf_facts(path)
    assert layout.size == path.stat().st_size
    reachable: dict[tuple[int, int], int] = {}
    for (gva, gpa, filesz, memsz), content in zip(facts["loads"], facts["memory"], strict=True):
        assert content == content_of(gpa, filesz)
        assert exact or filesz == memsz
        for offset in range(0, filesz, 0x10):
            reachable.setdefault((gva + offset, gpa + offset), 0)
            reachable[gva + offset, gpa + offset] += 1
    wanted = bounds or MemoryRange(0, 1 << 40)
    inside = list(blocks_within(blocks, wanted, MENDED))
    if not paging:
        assert [(load[1], load[3]) for load in facts["loads"]] == [(b.gpa, b.size) for b in inside]
        places = sorted((load[1], load[2]) for load in facts["loads"])
        assert all(a + n <= b for (a, n), (b, _) in pairwise(places))
    elif not exact:
        # Each page that is mapped and in the dump is in exactly one segment.
        expected = {
            (run.gva + gpa - run.gpa, gpa)
            for run in mappings
            for block in inside
            for gpa in range(max(run.gpa, block.gpa), min(run.gpa + run.size, block.end))
        }
        assert set(reachable) <= expected
        assert sum(load[2] for load in facts["loads"]) == len(expected)
        assert set(reachable.values()) <= {1}
        mapped = {gpa for _, gpa in expected}
        assert unmapped_size(plan.segments, inside) == sum(b.size for b in inside) - len(mapped)


@pytest.mark.parametrize("count", [65533, 65534])
def test_section_header_of_many_segments_is_behind_the_program_headers(tmp_path, count):
    """Program headers stay where makedumpfile and old versions of crash look for them."""
    block = RamBlock(0, 0x1000, "ram", 0)
    snapshot = GuestSnapshot(ARCHITECTURE, [block], [Vcpu(0, REGISTERS)], b"", UtsName())
    plan = make_plan(snapshot, MENDED)
    layout = lay_out(replace(plan, segments=(Segment(0, 0, 0x1000),) * count))
    path = tmp_path / "core"
    path.write_bytes(layout.head + bytes(0x1000))
    header = path.read_bytes()
    phnum = int.from_bytes(header[56:58], "little")
    assert int.from_bytes(header[32:40], "little") == 64
    if count == 65533:
        assert (phnum, header[60:62]) == (65534, b"\0\0")
    else:
        shoff = int.from_bytes(header[40:48], "little")
        assert (phnum, shoff) == (65535, 64 + 56 * (count + 1))
        assert int.from_bytes(header[shoff + 44 : shoff + 48], "little") == count + 1


def test_virtual_addresses_in_several_segments():
    segments = [Segment(0, 0x9000, 0x4000), Segment(0x1000, 0, 0x1000), Segment(0x3000, 0, 0x2000)]
    assert overlap_size(segments) == 0x2000
    assert overlap_size([Segment(0, 0, 0x1000), Segment(0x1000, 0, 0x1000)]) == 0
