"""Start programs that do not outlive a block that fails."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import AnyStr


class Process(subprocess.Popen[AnyStr]):
    """A program that is killed where its `with` block fails: who was to end it does not get there.

    A Popen would wait for it, for ever.
    """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, traceback)


class EnteredProcess(Process[AnyStr]):
    """What nsenter has started in other namespaces: signals are for it, and it ends nsenter."""

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            for pid in children_of(self.pid) or [self.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, sig)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process of one thread has started; none of one that is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return []
