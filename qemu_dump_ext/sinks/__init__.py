"""One file for each kind of target that a dump can go to."""

from __future__ import annotations

import sys
from functools import cache

from qemu_dump_ext.discovery import collect
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.sinks._declaration import SinkKind, Target
from qemu_dump_ext.sinks._sink import Sink

__all__ = ["Sink", "SinkKind", "Target", "all_sinks", "open_sink", "target_forms"]


@cache
def all_sinks() -> dict[str, SinkKind]:
    """Return every kind of target by name, in the order in which they are asked."""
    kinds = collect(sys.modules[__name__], "SINK", SinkKind)
    return dict(sorted(kinds.items(), key=lambda item: item[1].rank))


def target_forms() -> str:
    """Return how targets are written, for the help."""
    return ", ".join(kind.form for kind in reversed(all_sinks().values()) if kind.form)


def open_sink(target: str, *, force: bool, standard_output: int | None) -> Sink:
    """Return the sink for what the user named; entering it opens it.

    Args:
        target: A path, `file:PATH`, `fd:N`, `-` or `|command`.
        force: Replace an existing file.
        standard_output: Descriptor behind `-`; None where there is none to give away.

    Raises:
        RequestError: `target` is malformed, or exists and `force` is false.
        DumpWriteError: It cannot be created.
    """
    wanted = Target(target, force, standard_output)
    for kind in all_sinks().values():
        if (sink := kind.make(wanted)) is not None:
            return sink
    raise RequestError(f"{target} is nothing that a dump can be written to")
