"""Crash dumps of QEMU guests, taken from outside QEMU.

What stands in `__all__` is for programs, and documented in docs/api.md; everything else may change.
A name is imported when it is first used: what gdb loads needs the standard library alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qemu_dump_ext.api.dumps import StoredDump, convert, open_dump, verify
    from qemu_dump_ext.api.guests import Guest, StoppedGuest, connect, dump, guests
    from qemu_dump_ext.api.views import GuestView
    from qemu_dump_ext.crash_collector.collect_now import collect_crash
    from qemu_dump_ext.dump_readers import VerifyReport
    from qemu_dump_ext.engine.guests import FoundGuest, GuestWay
    from qemu_dump_ext.engine.info import GuestDescription
    from qemu_dump_ext.engine.report import DumpReport
    from qemu_dump_ext.errors import (
        CorruptDumpError,
        DumpError,
        DumpWriteError,
        RequestError,
        SourceError,
    )
    from qemu_dump_ext.plan.request import DumpOptions, MemoryRange

__version__ = "0.1.0"

# The most important first.
__all__ = [  # noqa: RUF022
    "dump",
    "connect",
    "guests",
    "open_dump",
    "convert",
    "verify",
    "collect_crash",
    "Guest",
    "StoppedGuest",
    "StoredDump",
    "GuestView",
    "DumpOptions",
    "MemoryRange",
    "DumpReport",
    "GuestDescription",
    "FoundGuest",
    "GuestWay",
    "VerifyReport",
    "DumpError",
    "RequestError",
    "SourceError",
    "DumpWriteError",
    "CorruptDumpError",
]

_HOMES = {
    "api.dumps": ("StoredDump", "convert", "open_dump", "verify"),
    "api.guests": ("Guest", "StoppedGuest", "connect", "dump", "guests"),
    "api.views": ("GuestView",),
    "crash_collector.collect_now": ("collect_crash",),
    "dump_readers": ("VerifyReport",),
    "engine.guests": ("FoundGuest", "GuestWay"),
    "engine.info": ("GuestDescription",),
    "engine.report": ("DumpReport",),
    "errors": (
        "CorruptDumpError",
        "DumpError",
        "DumpWriteError",
        "RequestError",
        "SourceError",
    ),
    "plan.request": ("DumpOptions", "MemoryRange"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
