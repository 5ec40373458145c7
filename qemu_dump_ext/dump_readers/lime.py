"""Read what LiME writes, and AVML without compression: ranges of memory, a header before each.

Source: LiME doc/README.md ("lime" format, version 1); AVML src/image.rs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from qemu_dump_ext.dump_readers._declaration import DumpReader, Fit
from qemu_dump_ext.dump_readers._extent_dump import ExtentDump
from qemu_dump_ext.dump_readers._extent_index import ExtentIndex
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._range_headers import (
    RANGE_HEADER_SIZE,
    RangeHeader,
    describe_ranges,
    read_range_header,
    verify_memory,
)
from qemu_dump_ext.errors import CorruptDumpError

_MAGIC = b"EMiL"
_VERSION = 1
_HEAD = _MAGIC + _VERSION.to_bytes(4, "little")
_RANGES_MAX = 1 << 20
"""More than any memory map has."""


class LimeFile(ExtentDump):
    """An open file of LiME.

    Attributes:
        ranges: Their headers, in the order of the file.
    """

    page_size = 1
    byte_order = "little"
    word_size = 8

    def __init__(self, image: DumpImage, format_suffix: str = "") -> None:
        self.image = image
        self.format = f"lime{format_suffix}"
        self.header = MappingProxyType({"version": _VERSION})
        self.ranges: list[RangeHeader] = []
        self.index = ExtentIndex()
        problem = self._read_headers()
        if problem is not None:
            image.problems = (*image.problems, problem)
        if not self.ranges:
            raise CorruptDumpError(problem or "no range of memory")
        self.index.settle()

    def _read_headers(self) -> str | None:
        position = 0
        while position < self.image.size:
            if position + RANGE_HEADER_SIZE > self.image.size:
                return f"the header of a range at offset {position:#x} is cut off"
            header = read_range_header(self.image, position, _MAGIC, _VERSION)
            if header is None:
                return f"no header of a range at offset {position:#x}: what follows is not read"
            if len(self.ranges) >= _RANGES_MAX:
                raise CorruptDumpError(f"more than {_RANGES_MAX} ranges: no guest has so many")
            self.ranges.append(header)
            position += RANGE_HEADER_SIZE
            self.index.append(header.first, header.size, position)
            position += header.size
        if position > self.image.size:
            return f"the last range ends {position - self.image.size} bytes behind the file's end"
        return None


def _describe(dump: LimeFile) -> Mapping[str, Callable[[], Any]]:
    return describe_ranges(dump.ranges)


READER = DumpReader(
    name="lime",
    probe=lambda head: Fit.SURE if head.startswith(_HEAD) else Fit.NO,
    open=LimeFile,
    describe=_describe,
    verify=verify_memory,
)
