"""One file for each format of a dump."""

from __future__ import annotations

import sys
from functools import cache

from qemu_dump_ext.discovery import collect
from qemu_dump_ext.dump_formats._declaration import DumpFormat


@cache
def all_dump_formats() -> dict[str, DumpFormat]:
    """Return every format by name."""
    return collect(sys.modules[__name__], "FORMAT", DumpFormat)
