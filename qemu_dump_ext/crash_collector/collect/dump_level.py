"""Which dump level fits a crash: what is in the functions of its call trace is in its dump, too."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.crash_collector.config.settings import Keep

_INNERMOST = 6
"""So many functions of a call trace say where a crash is; behind them is who called."""
_BITS = {"cache": 2 | 4, "user": 8, "free": 16}
_NAMES = {"cache": "the page cache is", "user": "memory of programs is", "free": "free pages are"}


def level_for_crash(level: int, keep: Keep, functions: Sequence[str]) -> tuple[int, Sequence[str]]:
    """Return the dump level for a crash, and remarks.

    Args:
        level: The one that is configured.
        keep: What stays for which functions.
        functions: Of the crash's call trace, innermost first; none where nobody knows.
    """
    remarks = []
    for kind, bits in _BITS.items():
        patterns = getattr(keep, kind)
        found = next(
            (name for name in functions[:_INNERMOST] if any(one.search(name) for one in patterns)),
            None,
        )
        if found is not None and level & bits:
            level &= ~bits
            remarks.append(f"{_NAMES[kind]} to stay in the dump: {found}() is in the call trace")
    return level, remarks
