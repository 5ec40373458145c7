"""What one file of this folder must declare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.plan.plan import DumpPlan
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.sinks import Sink
from qemu_dump_ext.value import Value

ProgressCallback = Callable[[int], None]
"""Gets the bytes of guest memory that have been added to the dump since the last call."""

WriteDump = Callable[[DumpRequest, DumpPlan, GuestMemory, Sink, ProgressCallback], None]
"""Writes a whole dump."""


def _accept(_: object) -> None:
    pass


def _failure(_has_begun: bool, reason: str) -> str:
    return f"dump: failed to write: {reason}"


class DumpFormat(Value):
    """One format that can be asked for.

    Attributes:
        name: The word for it in every door: `elf`, `kdump-raw-zlib`; that of QMP's
            DumpGuestMemoryFormat where QEMU has it.
        extension: How the names of its files end, without the dot.
        write: Writes a whole dump. Everything that it can refuse, it refuses before it reads
            guest memory or writes the first byte.
        start: Starts what takes long to come up, while no guest stands still for it: gets, with the
            request, how many bytes of guest memory the dump is expected to have, and has in a
            `with` block another `write`, which starts nothing unless there is more; None: nothing
            is started.
        check: Refuses what a request asks of it and it does not have, or what excludes each other,
            by RequestError; in QEMU's words where QEMU has them.
        require: Refuses what cannot be written here and now: by CodecUnavailableError where a
            package is missing, by RequestError where a codec has no such level.
        check_sink: Refuses, by RequestError, a target that it cannot be written to.
        of_windows: It describes a guest that runs Windows: `DumpPlan.windows` is there.
        whole_pages: Stores whole pages only: of a range, all pages that it touches.
        codec: The word behind `-z` that asks for it; None: the name alone does.
        raw: `-R` asks for it, besides that word.
        is_of_qemu: QEMU has it too.
        failure: What QEMU says where the target cannot be written: gets whether any of it was,
            and the system's reason.
    """

    name: str
    extension: str
    write: WriteDump
    start: Callable[[DumpRequest, int], AbstractContextManager[WriteDump]] | None = None
    check: Callable[[DumpRequest], None] = _accept
    require: Callable[[DumpRequest], None] = _accept
    check_sink: Callable[[Sink], None] = _accept
    of_windows: bool = False
    whole_pages: bool = False
    codec: str | None = None
    raw: bool = False
    is_of_qemu: bool = False
    failure: Callable[[bool, str], str] = _failure


class FormatFamily(Value):
    """The formats of one file.

    Attributes:
        name: Equal to the name of the file.
        formats: Returns them, in the order in which they are listed. The name of each begins with
            that of the file, with `-` for `_`.
    """

    name: str
    formats: Callable[[], Sequence[DumpFormat]]
