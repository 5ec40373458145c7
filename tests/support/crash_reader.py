"""Ask crash of a dump."""

from __future__ import annotations

import subprocess
from pathlib import Path

CRASH_SECONDS = 1200
"""It reads all of the kernel's DWARF first, which takes minutes on a busy host."""


def ask_crash(commands: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Return what crash says.

    Args:
        commands: What to type, each on a line of its own.
        words: The kernel, the dump and options.
    """
    return subprocess.run(
        ["crash", "-s", *words],
        input=f"{commands}quit\n",
        capture_output=True,
        text=True,
        timeout=CRASH_SECONDS,
        check=False,
    )
