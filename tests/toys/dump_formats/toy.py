"""A line of JSON, and all guest memory."""

from __future__ import annotations

import json

from qemu_dump_ext.dump_formats import DumpFormat, FormatFamily
from qemu_dump_ext.errors import RequestError


def _check(request):
    if request.paging:
        raise RequestError("a toy has no paging")


def _write(_request, plan, memory, sink, progress):
    blocks = [(block.gpa, block.size) for block in plan.ram_blocks]
    sink.write(json.dumps(blocks).encode() + b"\n")
    for gpa, size in blocks:
        buffer = bytearray(size)
        memory.read_into(gpa, memoryview(buffer))
        sink.write(memoryview(buffer))
        progress(size)


FORMATS = FormatFamily(
    "toy", lambda: [DumpFormat("toy", "toy", write=_write, check=_check, whole_pages=True)]
)
