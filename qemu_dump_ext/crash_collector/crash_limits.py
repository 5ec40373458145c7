"""What goes first when the store may not take more. Pure.

1. Whole crashes that are older than the age, then, above the count, the oldest.
2. Above the bytes, or below the free space: the oldest dumps of signatures that have more than one
   (everything else of the crash stays); then the oldest dumps at all; then the oldest crashes.

What is held, and what is not uploaded yet where it shall be, never goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from qemu_dump_ext.crash_collector.configuration import Limits
from qemu_dump_ext.crash_collector.crash_record import CrashRecord


@dataclass(frozen=True)
class Removal:
    """What is to be removed: the whole crash, or only its dump, and why."""

    record: CrashRecord
    whole: bool
    reason: str


def choose_removals(
    records: Sequence[CrashRecord],
    limits: Limits,
    *,
    now: datetime,
    free_bytes: int,
    needs_upload: bool = False,
) -> list[Removal]:
    """Return what must go, in this order.

    Args:
        records: All crashes of the store.
        limits: What it may take.
        now: A crash of the future, after the clock was set back, is not old.
        free_bytes: What the file system has left.
        needs_upload: Nothing goes that is not uploaded.
    """
    ordered = sorted(records, key=lambda record: record.moment)
    removals: list[Removal] = []
    movable = [r for r in ordered if not r.held and (r.uploaded or not needs_upload)]
    gone = set()
    if limits.age is not None:
        for record in movable:
            if (now - record.moment).total_seconds() > limits.age:
                removals.append(Removal(record, whole=True, reason="age"))
                gone.add(record.id)
    if limits.count is not None:
        surplus = len(ordered) - len(gone) - limits.count
        for record in [r for r in movable if r.id not in gone][: max(surplus, 0)]:
            removals.append(Removal(record, whole=True, reason="count"))
            gone.add(record.id)
    left = [r for r in ordered if r.id not in gone]
    freed = sum(_size(r) for r in ordered if r.id in gone)
    excess = limits.free - free_bytes - freed
    if limits.bytes is not None:
        excess = max(excess, sum(map(_size, left)) - limits.bytes)
    for removal, size in _by_bytes(left, {r.id for r in movable}):
        if excess <= 0:
            break
        removals.append(removal)
        excess -= size
    return removals


def _by_bytes(records: Sequence[CrashRecord], movable: set[str]) -> Iterator[tuple[Removal, int]]:
    dumps = Counter(r.signature.id for r in records if r.dump.file)
    without: dict[str, CrashRecord] = {}
    for at_least in (2, 1):
        for record in records:
            counted = dumps[record.signature.id] >= at_least
            if record.dump.file and record.id in movable and record.id not in without and counted:
                dumps[record.signature.id] -= 1
                without[record.id] = replace(record, dump=replace(record.dump, file=None, bytes=0))
                yield Removal(record, whole=False, reason="bytes"), record.dump.bytes
    for record in records:
        if record.id in movable:
            rest = without.get(record.id, record)
            yield (
                Removal(record, whole=True, reason="bytes"),
                _size(record) - (record.dump.bytes - rest.dump.bytes),
            )


def _size(record: CrashRecord) -> int:
    return sum(facts.bytes for facts in record.files.values())
