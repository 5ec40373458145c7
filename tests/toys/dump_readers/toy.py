"""A magic, the size of guest memory as u64, and guest memory from 0 on."""

from __future__ import annotations

from qemu_dump_ext.dump_readers import DumpFile, DumpReader, Fit
from qemu_dump_ext.errors import CorruptDumpError, GuestMemoryFaultError, NotADumpError

MAGICS = {b"TOY1": Fit.SURE, b"TOY?": Fit.MAYBE}


class ToyFile(DumpFile):
    byte_order, word_size, page_size = "little", 8, 1

    def __init__(self, image, suffix):
        self.image, self.format = image, "toy" + suffix
        self.size = int.from_bytes(image.read(4, 8), "little")
        if self.size > 1 << 40:
            raise NotADumpError("no toy is that large")
        if self.size % 2:
            raise CorruptDumpError("a toy is even")
        self.header = {"size": self.size}

    def _note_areas(self):
        return []

    def memory_ranges(self):
        yield 0, self.size

    def read_into(self, gpa, buffer):
        if gpa + len(buffer) > self.size:
            raise GuestMemoryFaultError(gpa, len(buffer), "not in the dump")
        self.image.read_into(12 + gpa, buffer)


def _verify(dump, report, _pool, _progress):
    report.expect(dump.image.size == 12 + dump.size, "a toy of another size")
    report.memory_bytes = dump.size


READER = DumpReader(
    name="toy",
    probe=lambda head: MAGICS.get(head[:4], Fit.NO),
    open=ToyFile,
    describe=lambda _dump: {"colour": lambda: "red", "wheels": lambda: {"front": 2}},
    verify=_verify,
)
