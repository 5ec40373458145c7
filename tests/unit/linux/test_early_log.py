"""Logs of kernels that say nothing of themselves yet, made up in both byte orders and widths."""

from __future__ import annotations

import struct
import sys

import pytest

from qemu_dump_ext.linux import early_log
from qemu_dump_ext.linux.early_log import EarlyLog, EarlyLogSearch
from tests.support.fake_kernel import FlatMemory

MIB = 1 << 20
COUNT = 4096
TEXTS = (
    (0, b"Booting Linux on physical CPU 0x0"),
    (0, b"Linux version 6.1.0 (somebody@somewhere)"),
    (1_500_000_000, b"Machine model: none"),
    (2_000_000_001, b"two lines\nof one record"),
    (2_000_000_002, b"Kernel panic - not syncing: early"),
)
FORMS = [("<", 8), ("<", 4), (">", 8), (">", 4)]


def plant_ring(
    memory: FlatMemory,
    order: str,
    word: int,
    *,
    log: int = 3 * MIB + 8,
    infos: int | None = 2 * MIB + 40,
    info_size: int = 88,
    first: int | None = None,
) -> None:
    """Write a ring of texts, and what belongs to each of them."""
    letter = "Q" if word == 8 else "I"
    start = ((1 << 32 if word == 8 else 1 << 30) - COUNT) if first is None else first
    place = log
    for index, (stamp, text) in enumerate(TEXTS):
        # Behind the text, its newline and the end of what it was made of.
        block = struct.pack(f"{order}{letter}", start + index) + text + b"\n0S0\0"
        memory.put(place, block)
        place += -(-len(block) // word) * word
        if infos is not None:
            memory.put(
                infos + info_size * index, struct.pack(f"{order}QQH", index, stamp, len(text))
            )


def plant_records(memory: FlatMemory, order: str, header: int, at: int = 3 * MIB) -> None:
    for stamp, text in TEXTS:
        size = -(-(header + len(text)) // 8) * 8
        memory.put(at, struct.pack(f"{order}QHHH", stamp, size, len(text), 0))
        memory.put(at + header, text)
        at += size


def find(memory: FlatMemory, order: str = "<", **options: float) -> EarlyLog | None:
    byte_order = "little" if order == "<" else "big"
    search = EarlyLogSearch(memory, memory.blocks, byte_order, **options)  # type: ignore[arg-type]
    return search.find()


def lines(log: EarlyLog | None) -> list[tuple[int, bytes]]:
    assert log is not None
    return [(record.nanoseconds, record.text) for record in log.records]


@pytest.mark.parametrize(("order", "word"), FORMS)
@pytest.mark.parametrize("known", ["<", ">"])
def test_a_ring_of_texts(order: str, word: int, known: str):
    memory = FlatMemory(8 * MIB)
    plant_ring(memory, order, word)
    log = find(memory, known)
    assert lines(log) == list(TEXTS)
    assert log is not None
    assert (log.gpa, log.has_stamps) == (3 * MIB + 8, True)


@pytest.mark.parametrize("info_size", [88, 96, 112])
def test_records_with_more_than_they_had(info_size: int):
    memory = FlatMemory(8 * MIB)
    plant_ring(memory, "<", 8, info_size=info_size)
    assert lines(find(memory)) == list(TEXTS)


def test_a_ring_whose_times_are_nowhere():
    memory = FlatMemory(8 * MIB)
    plant_ring(memory, "<", 8, infos=None)
    log = find(memory)
    assert log is not None
    assert not log.has_stamps
    assert lines(log) == [(0, text) for _, text in TEXTS]


def test_a_ring_whose_times_were_not_found_in_time(monkeypatch: pytest.MonkeyPatch):
    memory = FlatMemory(8 * MIB)
    plant_ring(memory, "<", 8)
    # The time is over when the texts have been read.
    monkeypatch.setattr("time.monotonic", lambda: float(memory.reads >= 2))
    search = EarlyLogSearch(memory, memory.blocks, "little", seconds=0.5)
    log = search.find()
    assert log is not None
    assert (log.has_stamps, search.gave_up) == (False, True)
    assert lines(log) == [(0, text) for _, text in TEXTS]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("size", [80, 170, 255])
def test_the_first_record_is_not_looked_for_in_empty_memory(order: str, size: int):
    """Its number and its time are 0, as nearly all of memory is while a kernel boots."""
    form = early_log._Form("little" if order == "<" else "big", 8)
    field = early_log._length_field(form, 0, size)
    assert early_log._has_no_zero(size)[0]
    assert not field.search(bytes(1 << 16))
    info = struct.pack(f"{order}QQH", 0, 5, size - 4).ljust(88, b"\0")
    places = [match.start() for match in field.finditer(bytes(64) + info * 2)]
    assert places == [at + early_log._low_byte_at(form) for at in (64, 64 + 88)]


def test_a_length_is_compared_as_a_whole(monkeypatch: pytest.MonkeyPatch):
    """With about 256 bytes, each byte of it may be 0, as both are in empty memory."""
    texts = [(stamp, text.ljust(258 - stamp, b"x")) for stamp, (_, text) in enumerate(TEXTS[:2])]
    monkeypatch.setattr(sys.modules[__name__], "TEXTS", texts)
    memory = FlatMemory(8 * MIB)
    plant_ring(memory, "<", 8)
    log = find(memory)
    assert log is not None
    assert log.has_stamps
    assert lines(log) == texts
    assert memory.reads <= 32


def test_what_belongs_to_texts_is_looked_for_near_them_first():
    memory = FlatMemory(64 * MIB)
    plant_ring(memory, "<", 8, log=33 * MIB, infos=32 * MIB + 40)
    assert lines(find(memory)) == list(TEXTS)
    # 16 pieces for the banner, then the texts, their piece, and one array.
    assert memory.reads <= 16 + 4


def test_a_ring_that_counts_in_all_bits():
    memory = FlatMemory(8 * MIB)
    plant_ring(memory, "<", 8, first=(1 << 62) - COUNT)
    assert lines(find(memory)) == list(TEXTS)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("header", [16, 20, 24])
def test_a_buffer_of_records(order: str, header: int):
    memory = FlatMemory(8 * MIB)
    plant_records(memory, order, header)
    log = find(memory, order)
    assert lines(log) == list(TEXTS)
    assert log is not None
    assert log.gpa == 3 * MIB


def test_the_log_with_more_records_is_the_one_in_use():
    memory = FlatMemory(16 * MIB)
    plant_ring(memory, "<", 8)
    short = FlatMemory(8 * MIB)
    plant_ring(short, "<", 8)
    memory.put(12 * MIB, bytes(short.data[3 * MIB : 3 * MIB + 8 + 48 + 56]))
    assert lines(find(memory)) == list(TEXTS)


@pytest.mark.parametrize(
    "around",
    [
        b"",
        b"\xff" * 64,
        b"\0" * 64,
        struct.pack("<Q", 1),
        struct.pack("<QHHHH", 0, 0xFFFF, 0xFFFF, 0xFFFF, 0),
        struct.pack("<Q", 1 << 32),
    ],
)
def test_a_banner_that_is_no_record_is_none(around: bytes):
    """As in the kernel's image, in a package of it, in somebody's mail."""
    memory = FlatMemory(8 * MIB)
    for place in (0, MIB - len(around), 5 * MIB + 3, 8 * MIB - 64 - len(around)):
        memory.put(place, around + b"Linux version 6.1.0 (x)\n" + around)
    memory.data = memory.data[: 8 * MIB]
    assert find(memory) is None


def test_as_many_banners_as_memory_has():
    memory = FlatMemory(4 * MIB)
    memory.data[:] = (struct.pack("<Q", (1 << 32) - 1) + b"Linux version 6.1.0 ....")[:32] * (
        4 * MIB // 32
    )
    log = find(memory)
    assert log is None or len(log.records) < 10


def test_the_search_ends_in_time():
    memory = FlatMemory(8 * MIB)
    plant_ring(memory, "<", 8)
    assert find(memory, seconds=-1.0) is None
    assert memory.reads == 0
