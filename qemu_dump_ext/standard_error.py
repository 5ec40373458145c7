"""Say something to whoever started a program; nobody may be there to hear it.

A dump is as complete where its report finds no reader: a closed or broken standard error never
changes what a program does, or its exit status.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path


def fill_standard_descriptors() -> None:
    """Open something under each of the numbers 0 to 2 that are closed: to be called first.

    What a program opens would get such a number, and be written to by mistake.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken. Nothing can be written to it, so that a dump that
            # was to go to standard output is refused.
            with suppress(OSError):
                _open_nowhere(os.O_RDONLY)


def open_nowhere() -> int:
    """Return a descriptor for a program of ours that has nothing to read or say: of /dev/null.

    Raises:
        OSError: The host allows no more descriptors.
    """
    return _open_nowhere(os.O_RDWR)


def _open_nowhere(flags: int) -> int:
    # Where there is no /dev/null, what cannot be read or written.
    is_there = Path(os.devnull).exists()
    return os.open(os.devnull if is_there else "/", flags if is_there else os.O_RDONLY)


def tell(text: str, end: str = "\n") -> None:
    """Write `text` to standard error, as far as it is read."""
    stream = sys.stderr
    if stream is None:
        return
    try:
        stream.write(f"{text}{end}")
        stream.flush()
    except (OSError, ValueError):  # nothing more is to be tried, not even at exit
        sys.stderr = None


def is_terminal() -> bool:
    """Tell whether somebody looks at standard error."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
