"""A dump behind what a file has already."""

from __future__ import annotations

import os
from pathlib import Path

from qemu_dump_ext.sinks import Sink, SinkKind, Target

_PREFIX = "append:"


class AppendingSink(Sink):
    """A file that grows by the dump."""

    def __init__(self, word: str) -> None:
        super().__init__(word)
        self._path = Path(word.removeprefix(_PREFIX))

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def commit(self) -> None:
        """Close it."""
        os.close(self._descriptor)

    abort = commit


def _make(target: Target) -> AppendingSink | None:
    return AppendingSink(target.word) if target.word.startswith(_PREFIX) else None


SINK = SinkKind("toy", 1, f"{_PREFIX}PATH", _make)
