from __future__ import annotations

import random
import struct

import pytest

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.linux.kernel_log import LogRecord, read_kernel_log
from qemu_dump_ext.linux.kernel_memory import KernelMemory
from tests.support.fake_kernel import KERNEL_MAP, LOG_AT, FlatMemory, plant_kernel, vmcoreinfo

MIB = 1 << 20
BASE = 2 * MIB
RING = (
    *(f"SYMBOL({name})={KERNEL_MAP + LOG_AT + offset:x}" for name, offset in [("prb", 0)]),
    "SIZE(printk_ringbuffer)=80",
    "OFFSET(printk_ringbuffer.desc_ring)=0",
    "OFFSET(printk_ringbuffer.text_data_ring)=48",
    "OFFSET(prb_desc_ring.count_bits)=0",
    "OFFSET(prb_desc_ring.descs)=8",
    "OFFSET(prb_desc_ring.infos)=16",
    "OFFSET(prb_desc_ring.head_id)=24",
    "OFFSET(prb_desc_ring.tail_id)=32",
    "OFFSET(prb_data_ring.size_bits)=0",
    "OFFSET(prb_data_ring.data)=8",
    "SIZE(prb_desc)=24",
    "OFFSET(prb_desc.state_var)=0",
    "OFFSET(prb_desc.text_blk_lpos)=8",
    "OFFSET(prb_data_blk_lpos.begin)=0",
    "OFFSET(prb_data_blk_lpos.next)=8",
    "SIZE(printk_info)=88",
    "OFFSET(printk_info.ts_nsec)=8",
    "OFFSET(printk_info.text_len)=16",
    "OFFSET(atomic_long_t.counter)=0",
)
RECORDS = (
    *(
        f"SYMBOL({name})={KERNEL_MAP + LOG_AT + 8 * index:x}"
        for index, name in enumerate(("log_buf", "log_buf_len", "log_first_idx", "log_next_idx"))
    ),
    "SIZE(printk_log)=16",
    "OFFSET(printk_log.ts_nsec)=0",
    "OFFSET(printk_log.len)=8",
    "OFFSET(printk_log.text_len)=10",
)
COUNT, TEXT_SIZE = 8, 256
COMMITTED, FINALIZED, REUSABLE = 1 << 62, 2 << 62, 3 << 62
ID_MASK = (1 << 62) - 1


def kernel(memory: FlatMemory, *lines: str) -> list[LogRecord]:
    text = vmcoreinfo("6.1.0", BASE, *lines)
    reader = KernelMemory(all_architectures()["x86_64"], memory, memory.blocks, text)
    return list(read_kernel_log(text, reader.read, "little", 8))


def ring_memory(texts: dict[int, tuple[int, int, bytes]], first: int, last: int) -> FlatMemory:
    """Records by id: state, nanoseconds, text."""
    memory = FlatMemory(8 * MIB)
    plant_kernel(memory, BASE, "6.1.0")
    at = BASE + LOG_AT
    here = KERNEL_MAP + LOG_AT
    memory.put(at, struct.pack("<Q", here + 0x100))
    ring = struct.pack("<IxxxxQQQQ8x", 3, here + 0x200, here + 0x800, last, first)
    memory.put(at + 0x100, ring + struct.pack("<IxxxxQ", 8, here + 0x1000))
    position = 2**64 - TEXT_SIZE + 208  # positions grow without bounds, and wrap
    for number, (state, stamp, text) in texts.items():
        size = -(-(8 + len(text)) // 8) * 8
        begin = position
        place = begin % TEXT_SIZE
        if place + size > TEXT_SIZE:  # a block is never divided: it begins again at 0
            position += TEXT_SIZE - place
            place = 0
        position = (position + size) % 2**64
        memory.put(at + 0x1000 + place, struct.pack("<Q", number) + text)
        index = number % COUNT
        memory.put(at + 0x200 + 24 * index, struct.pack("<QQQ", state | number, begin, position))
        memory.put(at + 0x800 + 88 * index, struct.pack("<QQH", 0, stamp, len(text)))
    return memory


def test_ring_buffer_in_order_with_wrap_and_states():
    first = ID_MASK - 2  # ids wrap too
    texts = {
        (first + step) & ID_MASK: (
            FINALIZED if step % 2 else COMMITTED,
            step * 1_000_000_000 + 5000,
            b"%d: " % step + b"x" * 20,
        )
        for step in range(6)
    }
    texts[2] = (0, 1, b"reserved, not yet written")
    texts[3] = (REUSABLE, 1, b"")
    # The descriptor for 4 is still that of the record before in its place.
    texts[4 - COUNT & ID_MASK] = (FINALIZED, 1, b"of an earlier round")
    memory = ring_memory(texts, first, 4)
    assert [record.text for record in kernel(memory, *RING)] == [
        b"%d: " % step + b"x" * 20 for step in range(5)
    ]


def test_lines_are_those_of_makedumpfile():
    record = LogRecord(12_345_678_900, b"two\nlines\t\x01\xff")
    assert record.line() == "[   12.345678] two\n               lines\t\\x01\\xff"


def test_a_text_longer_than_its_block_is_cut():
    memory = ring_memory({5: (COMMITTED, 0, b"abcdefgh")}, 5, 5)
    memory.put(BASE + LOG_AT + 0x800 + 88 * 5 + 16, b"\xff\xff")
    assert [record.text for record in kernel(memory, *RING)] == [b"abcdefgh"]


def old_log(first: int, *texts: bytes, size: int = 256) -> FlatMemory:
    memory = FlatMemory(8 * MIB)
    plant_kernel(memory, BASE, "4.19.0")
    at, place = BASE + LOG_AT, first
    for number, text in enumerate(texts):
        length = 16 + -(-len(text) // 8) * 8
        if place + length + 16 > size:
            memory.put(at + 0x1000 + place, bytes(16))
            place = 0
        header = struct.pack("<QHHHH", number * 1_000_000, length, len(text), 0, 0)
        memory.put(at + 0x1000 + place, header + text)
        place += length
    for index, value in enumerate((KERNEL_MAP + LOG_AT + 0x1000, size, first, place)):
        memory.put(at + 8 * index, struct.pack("<Q", value))
    return memory


def test_records_of_older_kernels_with_wrap():
    texts = [b"message %d" % number for number in range(6)]
    memory = old_log(120, *texts)
    records = kernel(memory, *RECORDS)
    assert [record.text for record in records] == texts
    assert records[3].line() == "[    0.003000] message 3"


def test_a_log_of_records_that_never_ends():
    memory = old_log(0, b"a", b"b")
    memory.put(BASE + LOG_AT + 24, struct.pack("<Q", 7))  # no record ends there
    memory.put(BASE + LOG_AT + 0x1000 + 48, bytes(16))
    assert len(kernel(memory, *RECORDS)) < 100


HOSTILE = {
    "no log": (),
    "pointer to nowhere": (
        *(line for line in RING if "SYMBOL" not in line),
        "SYMBOL(prb)=ffff800000000000",
    ),
    "not a number": ("SYMBOL(prb)=zz",),
    "huge structure": (
        *(line for line in RING if "SIZE(printk_info)" not in line),
        "SIZE(printk_info)=999999999999",
    ),
    "negative offset": (
        *(line for line in RING if "prb_desc.state_var" not in line),
        "OFFSET(prb_desc.state_var)=-8",
    ),
    "offset outside": (
        *(line for line in RING if "head_id" not in line),
        "OFFSET(prb_desc_ring.head_id)=4000",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptions_end_in_one_error(name):
    memory = ring_memory({5: (COMMITTED, 0, b"abcdefgh")}, 5, 5)
    with pytest.raises(SourceError):
        kernel(memory, *HOSTILE[name])


def test_hostile_buffers():
    pick = random.Random(3)  # noqa: S311
    for lines, start in ((RING, 0x100), (RECORDS, 0)):
        for _ in range(300):
            memory = ring_memory({5: (COMMITTED, 0, b"abcdefgh")}, 5, 5)
            if lines is RECORDS:
                memory = old_log(0, b"a", b"b")
            for _ in range(pick.randrange(1, 6)):
                place = (
                    BASE
                    + LOG_AT
                    + start
                    + pick.choice((pick.randrange(80), pick.randrange(0x1800)))
                )
                memory.put(place, pick.randbytes(pick.choice((1, 4, 8))))
            try:
                records = kernel(memory, *lines)
            except SourceError:
                continue
            assert len(records) < 1 << 16
