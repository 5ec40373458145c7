"""Remove from the store what its limits do not allow."""

from __future__ import annotations

from datetime import UTC, datetime

from qemu_dump_ext.crash_collector.config.settings import Limits
from qemu_dump_ext.crash_collector.store.limits import Removal, choose_removals
from qemu_dump_ext.crash_collector.store.store import CrashStore


def prune(
    store: CrashStore,
    limits: Limits,
    *,
    now: datetime | None = None,
    needs_upload: bool = False,
    dry_run: bool = False,
) -> list[Removal]:
    """Remove what the limits do not allow; returns what was removed.

    Args:
        store: Whose crashes.
        limits: What it may take.
        now: The time; without, that of the clock.
        needs_upload: Nothing goes that is not uploaded.
        dry_run: Remove nothing, and return what would be.

    Raises:
        DumpWriteError: The store cannot be changed.
    """
    with store.locked():
        removals = choose_removals(
            list(store.records()),
            limits,
            now=now or datetime.now(UTC),
            free_bytes=store.free_bytes(),
            needs_upload=needs_upload,
            canonical=store.states().canonical,
        )
        for removal in () if dry_run else removals:
            if removal.whole:
                store.remove(removal.record)
            else:
                store.remove_dump(removal.record, f"removed by the limits: {removal.reason}")
    return removals
