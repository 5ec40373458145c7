"""Make a dump of another dump."""

from __future__ import annotations

from qemu_dump_ext.dump_readers import DumpFile
from qemu_dump_ext.engine.dump import dump_stored
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.errors import CorruptDumpError, GuestMemoryFaultError, RequestError
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.sinks import Sink

SEARCH_SECONDS = 60.0
"""How long VMCOREINFO is searched for by default, where a dump has none."""


def convert(
    request: DumpRequest,
    dump: DumpFile,
    sink: Sink,
    *,
    progress: ProgressMeter,
    target: str | None = None,
    keep: bool = False,
    search_seconds: float = SEARCH_SECONDS,
) -> DumpReport:
    """Make a dump of another one.

    What the earlier dump does not have stays absent, and is named. `sink` holds a complete dump
    when this returns, see `engine.dump.dump`.

    Args:
        request: What to write; of what concerns a guest that runs, nothing may be asked for.
        dump: The earlier dump; stays open.
        sink: Where to write.
        progress: Is told of every piece of guest memory.
        target: Name of the architecture where the dump does not tell it; None: it does.
        keep: Mend nothing: the new dump says what the earlier one says.
        search_seconds: How long VMCOREINFO may be searched for, where the dump has none.

    Raises:
        RequestError: The request is impossible.
        UnsupportedTargetError: Nothing tells of what guest the dump is.
        CorruptDumpError: The dump is damaged beyond use, or a page of it is.
        SourceError: It has no kernel in which to find what is asked for.
        DumpWriteError: The new dump cannot be written.
    """
    for word, asked in (
        ("--exact", request.exact),
        ("--snapshot", request.snapshot),
        ("--max-pause", request.max_pause is not None),
    ):
        if asked:
            raise RequestError(f"{word} is for guests that run, and not for dumps of them")
    for file in dump.files:
        file.threads = request.threads
    guest = StoredGuest(dump, search_seconds=search_seconds, target=target, keep=keep)
    try:
        return dump_stored(request, guest, sink, progress=progress)
    except GuestMemoryFaultError as error:
        raise CorruptDumpError(
            f"the earlier dump is damaged: {error}", hint="qemu-dump verify shows all damage"
        ) from error
