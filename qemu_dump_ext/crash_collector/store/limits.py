"""What goes first when the store may not take more. Pure.

1. Whole crashes that are older than the age, then, above the count, the oldest.
2. Above the bytes, or below the free space: the oldest dumps of signatures that have more than one
   (everything else of the crash stays), then the oldest dumps at all.
3. Above the bytes: the oldest crashes. What else fills the disk takes no more than the dumps.

What is held, and what is not uploaded yet where it shall be, never goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from qemu_dump_ext.crash_collector.config.settings import Limits
from qemu_dump_ext.crash_collector.record import CrashRecord


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
    gone: set[str] = set()
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
    short = limits.free - free_bytes - freed
    above = 0 if limits.bytes is None else sum(map(_size, left)) - limits.bytes
    without: set[str] = set()
    for record in _dumps_in_order(left, {r.id for r in movable}):
        if max(short, above) <= 0:
            break
        removals.append(Removal(record, whole=False, reason="free" if above <= 0 else "bytes"))
        without.add(record.id)
        short, above = short - record.dump.bytes, above - record.dump.bytes
    for record in movable:
        if above <= 0:
            break
        if record.id not in gone:
            removals.append(Removal(record, whole=True, reason="bytes"))
            above -= _size(record) - (record.dump.bytes if record.id in without else 0)
    return removals


def _dumps_in_order(records: Sequence[CrashRecord], movable: set[str]) -> Iterator[CrashRecord]:
    dumps = Counter(r.signature.id for r in records if r.dump.file)
    gone: set[str] = set()
    for at_least in (2, 1):
        for record in records:
            if (
                record.dump.file
                and record.id in movable - gone
                and dumps[record.signature.id] >= at_least
            ):
                dumps[record.signature.id] -= 1
                gone.add(record.id)
                yield record


def _size(record: CrashRecord) -> int:
    return sum(facts.bytes for facts in record.files.values())
