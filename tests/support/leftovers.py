"""What this process holds: to be the same behind a piece of work as before it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that the `with` block leaves no descriptor, thread or child behind."""
    before = _held()
    yield
    assert _held() == before


def _held() -> tuple[dict[str, str], set[int | None], list[str]]:
    descriptors = {}
    for link in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # the one by which they were listed
            descriptors[link.name] = str(link.readlink())
    threads = {thread.ident for thread in threading.enumerate()}
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text("ascii").split()
    return descriptors, threads, children
