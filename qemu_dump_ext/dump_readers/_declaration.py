"""What one file of this folder must declare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, Generic, TypeVar

from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._verify_report import OrderedPool, Progress, VerifyReport
from qemu_dump_ext.value import Value

HEAD_SIZE = 16
"""Bytes of a dump by which its format is told."""
LISTED_MAX = 1024
"""Segments or ranges of memory that a description lists; of more, it tells the count."""

DumpT = TypeVar("DumpT", bound=DumpFile)


class Fit(IntEnum):
    """What the first bytes of a dump say about a format."""

    NO = 0
    MAYBE = 1
    SURE = 2


class DumpReader(Value, Generic[DumpT]):
    """One format that is read.

    Attributes:
        name: The word for it; equal to the name of the file.
        probe: Gets up to `HEAD_SIZE` bytes, and says whether this is the format.
        open: Gets the dump, and what is added to the name of its format where it was inside
            another one. Raises NotADumpError where it is none of this format, CorruptDumpError
            where it is one and its headers are damaged.
        describe: Returns what `inspect` shows besides what every dump has: each part by its name,
            made when it is called, and raising CorruptDumpError where it cannot be.
        verify: Adds to a report all damage that can be found. Raises CorruptDumpError where what
            follows cannot be looked at.
    """

    name: str
    probe: Callable[[bytes], Fit]
    open: Callable[[DumpImage, str], DumpT]
    describe: Callable[[DumpT], Mapping[str, Callable[[], Any]]]
    verify: Callable[[DumpT, VerifyReport, OrderedPool, Progress], None]
