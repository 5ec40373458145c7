"""Which pages our dump levels leave out of a dump that has all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.linux.page_filter import FilterRules


def left_out_of(dump: Path, levels: Iterable[int]) -> Mapping[int, set[int]]:
    """Return, by level, the pages that `--exact` leaves out of a whole dump."""
    with open_dump(dump) as opened:
        guest = StoredGuest(opened)
        pages = guest.kernel_pages(guest.find_vmcoreinfo(None))
        found = {level: pages.excluded(FilterRules(level, exact=True)) for level in levels}
    return {
        level: {page for first, end in excluded.ranges for page in range(first, end)}
        for level, excluded in found.items()
    }
