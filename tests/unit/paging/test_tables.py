"""Many tables read at once say what they say one by one."""

from __future__ import annotations

import random

import pytest

from qemu_dump_ext.errors import GuestMemoryFaultError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.paging.tables import TableReader
from tests.support.fake_kernel import FlatMemory

_TABLE = 4096
_CHUNK = 1 << 16
_BROKEN = 5 * _CHUNK


class _Memory(FlatMemory):
    def read_into(self, gpa: int, buffer: memoryview) -> None:
        if gpa <= _BROKEN < gpa + len(buffer):
            raise GuestMemoryFaultError(gpa, len(buffer), "it is broken there")
        super().read_into(gpa, buffer)


@pytest.mark.parametrize(
    ("gpa", "count"), [(_CHUNK // 2, 40), (3 * _CHUNK, 48), (4 * _CHUNK, 64), (9 * _CHUNK, 64)]
)
def test_many_tables_at_once(gpa: int, count: int):
    memory = _Memory(16 * _CHUNK)
    memory.put(0, random.Random(1).randbytes(16 * _CHUNK))  # noqa: S311
    blocks = [RamBlock(0, 10 * _CHUNK, "ram", 0), RamBlock(11 * _CHUNK, 5 * _CHUNK, "ram", 0)]
    places = range(gpa, gpa + count * _TABLE, _TABLE)
    one_by_one = TableReader(memory, blocks)
    parts = b"".join(one_by_one(place, _TABLE) for place in places)
    reads = memory.reads
    assert TableReader(memory, blocks)(gpa, count * _TABLE) == parts
    is_readable = gpa + count * _TABLE <= _BROKEN
    assert (memory.reads == reads + 1) == is_readable
