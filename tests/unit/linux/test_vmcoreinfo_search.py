from __future__ import annotations

import random
import struct
from collections import deque
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest

from qemu_dump_ext.architectures import AddressWindow, all_architectures
from qemu_dump_ext.errors import PauseLimitError, RequestError
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.linux import vmcoreinfo_pointers, vmcoreinfo_search
from qemu_dump_ext.linux.vmcoreinfo_pointers import NotePointers
from qemu_dump_ext.linux.vmcoreinfo_search import Evidence, NoteSearch
from qemu_dump_ext.pages import zero_pages
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_text
from tests.support.fake_kernel import (
    KERNEL_MAP,
    NOTE_AT,
    TEXT_AT,
    FlatMemory,
    elf_note,
    plant_kernel,
    vcpus_with,
    vmcoreinfo,
)

X86_64 = all_architectures()["x86_64"]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_found_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmcoreinfo_search, "_RECENT", deque())


def search(memory: FlatMemory, *roots: int) -> NoteSearch:
    return NoteSearch(X86_64, "little", memory, memory.blocks, vcpus_with(*roots))


def test_the_live_kernel_is_taken_among_several():
    memory = FlatMemory(48 * MIB)
    plant_kernel(memory, 2 * MIB, "5.10.0-earlier-boot")
    memory.put(12 * MIB, elf_note(vmcoreinfo("4.4.0-page-left-over", 40 * MIB)))
    live = plant_kernel(memory, 16 * MIB, "6.1.0-live")
    plant_kernel(memory, 32 * MIB, "6.12.0-for-kdump")
    result = search(memory, live).find()
    assert result.chosen is not None
    assert (result.chosen.release, result.chosen.evidence) == ("6.1.0-live", Evidence.LIVE)
    assert result.chosen.gpa == 16 * MIB + NOTE_AT
    assert "page tables of a vCPU" in result.remarks[0]
    assert len([remark for remark in result.remarks if "not taken" in remark]) == 2
    # Without vCPUs, what is borne out wins over what is not; the first of those.
    result = search(memory).find()
    assert result.chosen is not None
    assert (result.chosen.release, result.chosen.evidence) == (
        "5.10.0-earlier-boot",
        Evidence.BANNER,
    )
    assert any("4.4.0-page-left-over at 0xc00000: nothing else" in r for r in result.remarks)


def test_the_user_chooses():
    memory = FlatMemory(32 * MIB)
    live = plant_kernel(memory, 2 * MIB, "6.1.0-live")
    plant_kernel(memory, 16 * MIB, "6.12.0-for-kdump")
    for wanted in ("6.12.0-for-kdump", hex(16 * MIB + NOTE_AT)):
        chosen = search(memory, live).find(wanted).chosen
        assert chosen is not None
        assert chosen.gpa == 16 * MIB + NOTE_AT
    with pytest.raises(RequestError, match=r"found: 6\.1\.0-live at .*6\.12\.0-for-kdump at"):
        search(memory, live).find("7.0")


def test_the_text_alone_becomes_a_note():
    memory = FlatMemory(8 * MIB)
    plant_kernel(memory, 2 * MIB, "6.1.0")
    memory.put(2 * MIB + NOTE_AT, bytes(4096))
    chosen = search(memory).find().chosen
    assert chosen is not None
    assert chosen.gpa == 2 * MIB + TEXT_AT
    assert vmcoreinfo_text(chosen.note, "little") == vmcoreinfo("6.1.0", 2 * MIB)


def test_a_kernel_whose_name_differs_is_not_borne_out():
    memory = FlatMemory(8 * MIB)
    live = plant_kernel(memory, 2 * MIB, "6.1.0", named="6.2.0")
    chosen = search(memory, live).find().chosen
    assert chosen is not None
    assert chosen.evidence is Evidence.TEXT


IMPOSTORS = {
    "unaligned": (0x800, elf_note(vmcoreinfo("1", 0))),
    "misaligned for its page size": (
        0x1000,
        elf_note(vmcoreinfo("1", 0).replace(b"4096", b"65536")),
    ),
    "impossible page size": (0, elf_note(vmcoreinfo("1", 0).replace(b"4096", b"1"))),
    "no page size": (0, elf_note(b"OSRELEASE=1\nSYMBOL(x)=1\n")),
    "format string": (0, b"OSRELEASE=%s\n\0PAGESIZE=%ld\n"),
    "too long": (
        0,
        b"\x0b\0\0\0\xff\xff\xff\xff\0\0\0\0VMCOREINFO\0\0OSRELEASE=1\nPAGESIZE=4096\n",
    ),
    "text without end": (0, (b"OSRELEASE=1\nPAGESIZE=4096\nSYMBOL(a)=1\n" * 4000)),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_what_is_no_note_is_not_taken(name):
    memory = FlatMemory(1 * MIB)
    offset, content = IMPOSTORS[name]
    memory.put(0x40000 + offset, content)
    result = search(memory).find()
    assert result.chosen is None
    assert result.remarks == ("VMCOREINFO was not found in guest memory",)


def test_hostile_numbers_and_very_many_notes():
    memory = FlatMemory(4 * MIB)
    pick = random.Random(5)  # noqa: S311
    for page in range(0, 4 * MIB, 8192):
        values = [str(pick.choice([-1, 0, 1 << 63, 1 << 200, "x" * 100])) for _ in range(3)]
        text = (
            f"OSRELEASE=\x1b[31m{page}\nPAGESIZE=4096\nSYMBOL(init_uts_ns)={values[0]}\n"
            f"OFFSET(uts_namespace.name)={values[1]}\nNUMBER(phys_base)={values[2]}\n"
        )
        memory.put(page, elf_note(text.encode()))
    result = search(memory, 0).find()
    assert result.chosen is not None
    assert any("the search ended at the 64th" in remark for remark in result.remarks)
    assert all(remark.isprintable() for remark in result.remarks)


def test_slow_memory_is_read_at_page_starts_only():
    memory = FlatMemory(8 * MIB)
    live = plant_kernel(memory, 2 * MIB, "6.1.0")
    memory.is_slow = True
    chosen = search(memory, live).find().chosen
    assert chosen is not None
    assert memory.reads < 2 * MIB // 4096 + 100
    assert memory.largest_read <= 64 << 10


def test_memory_that_was_never_touched_is_not_read():
    memory = FlatMemory(8 * MIB)
    live = plant_kernel(memory, 2 * MIB, "6.1.0")
    memory.populated = lambda _gpa, _size: [(2 * MIB, 3 * MIB)]  # type: ignore[attr-defined]
    assert search(memory, live).find("6.1.0").chosen is not None
    assert memory.reads < 10


@pytest.mark.parametrize("is_slow", [False, True])
def test_the_search_can_be_given_up(*, is_slow: bool):
    memory = FlatMemory(64 * MIB)
    memory.is_slow = is_slow
    searched = 0

    def advance(size: int) -> None:
        nonlocal searched
        searched += size
        if searched >= 12 << 10:
            raise PauseLimitError("for too long")

    given_up = NoteSearch(X86_64, "little", memory, memory.blocks, advance=advance)
    with pytest.raises(PauseLimitError):
        given_up.find()
    assert memory.reads < 1024


@pytest.mark.parametrize("is_slow", [False, True])
def test_the_search_ends_in_time_and_says_how_far_it_came(*, is_slow: bool):
    memory = FlatMemory(64 * MIB)
    memory.is_slow = is_slow
    search = NoteSearch(X86_64, "little", memory, memory.blocks, seconds=0)
    result = search.find()
    assert result.chosen is None
    assert any(remark.endswith("from its end on for 0 s only: 0 MiB") for remark in result.remarks)
    assert memory.reads <= 1


@pytest.mark.parametrize("told", [True, False])
def test_a_kernel_that_does_not_tell_where_its_name_is(*, told: bool):
    """Before 5.11, where it lies behind a counter."""
    memory = FlatMemory(32 * MIB)
    live = plant_kernel(memory, 2 * MIB, "5.10.0-live")
    if not told:
        for place in (2 * MIB + NOTE_AT, 2 * MIB + TEXT_AT):
            content = bytes(memory.data[place : place + 4096])
            line = b"OFFSET(uts_namespace.name)=4\n"
            memory.put(place, content.replace(line, b"OFFSET(uts_namespace.pid)=24\n"))
    chosen = search(memory, live).find().chosen
    assert chosen is not None
    assert chosen.evidence == Evidence.LIVE
    assert (b"uts_namespace.name" in chosen.text) == told


def test_the_last_place_is_looked_at_first_and_by_itself():
    memory = FlatMemory(16 * MIB)
    live = plant_kernel(memory, 2 * MIB, "6.1.0-live")
    first = search(memory, live).find()
    assert first.chosen is not None
    assert first.chosen.gpa == 2 * MIB + NOTE_AT
    sizes: list[int] = []
    again = NoteSearch(
        X86_64, "little", memory, memory.blocks, vcpus_with(live), advance=sizes.append
    )
    assert again.find(everywhere=False).chosen == first.chosen
    assert not sizes
    elsewhere = FlatMemory(16 * MIB)
    live = plant_kernel(elsewhere, 6 * MIB, "6.1.0-live")
    assert search(elsewhere, live).find(everywhere=False).remarks == (
        "VMCOREINFO was not looked for in all of guest memory",
    )


def test_memory_is_searched_from_its_end_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vmcoreinfo_search, "_CHUNK", 4 * MIB)
    memory = FlatMemory(32 * MIB)
    live = plant_kernel(memory, 28 * MIB, "6.1.0-live")
    sizes: list[int] = []
    found = NoteSearch(
        X86_64, "little", memory, memory.blocks, vcpus_with(live), advance=sizes.append
    ).find()
    assert found.chosen is not None
    assert sum(sizes) <= 4 * MIB


@pytest.mark.parametrize("at", [2 * MIB, 20 * MIB])
def test_a_kernel_is_found_before_the_last_chunks_and_in_them(
    at: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vmcoreinfo_search, "_CHUNK", MIB)
    memory = FlatMemory(24 * MIB)
    live = plant_kernel(memory, at, "6.1.0-live")
    chosen = search(memory, live).find().chosen
    assert chosen is not None
    assert chosen.evidence is Evidence.LIVE


def _point(memory: FlatMemory, at: int, kernel: int, virtual: int) -> None:
    """Let a kernel point to what it has in a page, mapped `virtual` behind where it is."""
    length_of_real_ones = 3000
    pointers = (virtual + kernel + TEXT_AT, length_of_real_ones, virtual + kernel + NOTE_AT)
    memory.put(at, struct.pack("<3Q", *pointers))


@pytest.mark.parametrize("register", ["rip", "idt_base"])
def test_the_kernel_points_to_it(register: str):
    """Whatever lies behind it in memory is not searched."""
    memory = FlatMemory(96 * MIB)
    live = plant_kernel(memory, 2 * MIB, "6.1.0-live")
    _point(memory, 7 * MIB + 0x1238, 2 * MIB, 0xFF110000 << 32)
    vcpus = [
        replace(vcpu, registers={**vcpu.registers, register: KERNEL_MAP + MIB})
        for vcpu in vcpus_with(live)
    ]
    sizes: list[int] = []
    search = NoteSearch(X86_64, "little", memory, memory.blocks, vcpus, advance=sizes.append)
    chosen = search.find().chosen
    assert chosen is not None
    assert chosen.evidence is Evidence.LIVE
    assert sum(sizes) <= 10 * MIB


@pytest.mark.parametrize(
    ("name", "pointers"),
    [
        ("aarch64", struct.pack("<3Q", 0xFFFF000000232000, 3000, 0xFFFF000000230000)),
        ("arm", struct.pack("<3I", 0xC0232000, 3000, 0xC0230000)),
        ("s390x", struct.pack(">3Q", 0x232000, 3000, 0x230000)),
        ("mips", struct.pack(">3I", 0x80232000, 3000, 0x80230000)),
    ],
)
def test_where_no_page_tables_are_known_the_lowest_memory_is_looked_at(name: str, pointers: bytes):
    """Of arm64, QMP does not tell where they are."""
    memory = FlatMemory(96 * MIB)
    memory.put(9 * MIB, pointers)
    byte_order = all_architectures()[name].cores[0].byte_order
    found = NotePointers(all_architectures()[name], memory, memory.blocks, byte_order=byte_order)
    targets = found.targets([Vcpu(0, {})], (), lambda _gpa, size: bytes(size), lambda _size: None)
    assert list(targets) == [(0x232000, 0x230000)]


def test_pointers_of_a_hostile_kernel_are_bounded():
    memory = FlatMemory(16 * MIB)
    live = plant_kernel(memory, 2 * MIB, "6.1.0-live")
    memory.put(4 * MIB, struct.pack("<3Q", 3 * MIB, 4000, 3 * MIB) * (4 * MIB // 24))
    vcpus = [
        replace(vcpu, registers={**vcpu.registers, "rip": KERNEL_MAP}) for vcpu in vcpus_with(live)
    ]
    before = memory.reads
    chosen = NoteSearch(X86_64, "little", memory, memory.blocks, vcpus).find().chosen
    assert chosen is not None
    assert memory.reads - before < 5000


@pytest.mark.parametrize(("name", "size"), [("x86_64", 8), ("arm", 4), ("s390x", 8), ("mips", 4)])
def test_lengths_are_the_same_by_numpy_and_without(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
):
    memory = FlatMemory(4096)
    order = all_architectures()[name].cores[0].byte_order
    found = NotePointers(all_architectures()[name], memory, memory.blocks, byte_order=order)
    numbers = [0, 1, 255, 256, 4000, 65535, 65536, 1 << 8 * size - 1] * 2
    content = b"".join(number.to_bytes(size, order) for number in [300, *numbers, 300])
    zero_pages.numpy_or_none()
    by_numpy = list(found._small_numbers(memoryview(content), size))
    monkeypatch.setattr(vmcoreinfo_pointers, "numpy_if_loaded", lambda: None)
    assert by_numpy == list(found._small_numbers(memoryview(content), size))
    assert by_numpy == [4, 5, 6, 12, 13, 14]


@pytest.mark.parametrize("ticks", [False, True])
def test_pointers_into_memory_that_was_never_touched(
    monkeypatch: pytest.MonkeyPatch, *, ticks: bool
):
    """Each may point to any GiB: none is looked for twice, and not when the time is over."""
    memory = FlatMemory(16 * MIB)
    live = plant_kernel(memory, 2 * MIB, "6.1.0-live")
    _point(memory, 5 * MIB, 2 * MIB, 0xFF110000 << 32)
    memory.put(4 * MIB, struct.pack("<3Q", 17 * MIB, 4000, 18 * MIB) * 100)
    memory.blocks = [replace(memory.blocks[0], size=64 << 30)]
    questions: list[int] = []

    def populated(gpa: int, size: int) -> list[tuple[int, int]]:
        questions.append(gpa)
        low, high = gpa, min(gpa + size, len(memory.data))
        return [(low, high)] if low < high else []

    memory.populated = populated  # type: ignore[attr-defined]
    vcpus = [
        replace(vcpu, registers={**vcpu.registers, "rip": KERNEL_MAP}) for vcpu in vcpus_with(live)
    ]
    if ticks:
        clock = SimpleNamespace(monotonic=count().__next__)
        monkeypatch.setattr(vmcoreinfo_search, "time", clock)
    found = NoteSearch(X86_64, "little", memory, memory.blocks, vcpus, seconds=50).find()
    assert (found.chosen is None) == ticks
    assert len(questions) <= (200 if ticks else 100 * 64 + 200)


@pytest.mark.parametrize(
    ("offset", "counter", "evidence"),
    [
        (0x16200000, KERNEL_MAP + 0x8000, Evidence.CODE),
        (0, KERNEL_MAP + 0x8000, Evidence.BANNER),
        (0x16200000, KERNEL_MAP + 65 * MIB, Evidence.BANNER),
        (0x16200000, 0x400000, Evidence.BANNER),
    ],
)
def test_a_vcpu_of_unknown_page_tables_is_in_code_of_the_kernel(
    offset: int, counter: int, evidence: Evidence
):
    """Kernels that are at the same address in each boot are not told apart by it."""
    memory = FlatMemory(32 * MIB)
    lines = (f"SYMBOL(_stext)={KERNEL_MAP:x}", f"KERNELOFFSET={offset:x}")
    plant_kernel(memory, 2 * MIB, "6.1.0-live", *lines)
    vcpus = [Vcpu(0, {"rip": counter})]
    chosen = NoteSearch(X86_64, "little", memory, memory.blocks, vcpus).find().chosen
    assert chosen is not None
    assert chosen.evidence is evidence


@pytest.mark.parametrize(("is_slow", "most"), [(False, 128 * MIB), (True, 8 * MIB)])
def test_vcpus_in_programs_all_over_memory_are_bounded(*, is_slow: bool, most: int):
    memory = FlatMemory(512 * MIB)
    memory.is_slow = is_slow
    vcpus = [Vcpu(index, {"rip": 4 * index * MIB}) for index in range(128)]
    found = NotePointers(X86_64, memory, memory.blocks, byte_order="little")
    sizes: list[int] = []
    everything = [AddressWindow(0, 512 * MIB, 0)]
    assert not list(found.targets(vcpus, everything, lambda _gpa, size: bytes(size), sizes.append))
    assert sum(sizes) == most
