"""What a process makes private that has a mount namespace of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def mount(*words: str) -> None:
    """Run `mount`."""
    subprocess.run(["mount", *words], check=True)


def make_private(places: Sequence[str], shared: Sequence[str]) -> None:
    """Have directories of its own that are empty and in memory.

    Args:
        places: These directories, where they are there.
        shared: Directories in them that stay as they are.
    """
    kept = {path: os.open(path, os.O_PATH) for path in shared}
    for path in filter(os.path.isdir, places):
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", path)
    for path, descriptor in kept.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.path.samestat(Path(path).stat(), os.fstat(descriptor)):
            mount("--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{descriptor}", path)
        os.close(descriptor)
