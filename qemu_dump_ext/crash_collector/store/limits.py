"""What goes first when the store may not take more. Pure.

1. Whole crashes that are older than the age, then those above the count.
2. Above the bytes, or below the free space: dumps; everything else of the crash stays.
3. Above the bytes: whole crashes. What else fills the disk takes no more than the dumps.

Of each, what is most repeated goes first, and of that the oldest, but for the last dump. The only
one of its kind goes when nothing else is left that may, for a limit is a limit. A kind is a
signature, or, where that has no frames and so says little, a signature and a guest.

What is held, and what is not uploaded yet where it shall be, never goes.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import islice

from qemu_dump_ext.crash_collector.config.settings import Limits
from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.value import Value


class Removal(Value):
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
    canonical: Callable[[str], str] = str,
) -> list[Removal]:
    """Return what must go, in this order.

    Args:
        records: All crashes of the store.
        limits: What it may take.
        now: A crash of the future, after the clock was set back, is not old.
        free_bytes: What the file system has left.
        needs_upload: Nothing goes that is not uploaded.
        canonical: Tells which signature stands for one that is merged.
    """
    ordered = sorted(records, key=lambda record: record.moment)
    removals: list[Removal] = []
    movable = [r for r in ordered if not r.held and (r.uploaded or not needs_upload)]
    may_go, kind = {r.id for r in movable}, partial(_kind, canonical=canonical)
    gone: set[str] = set()
    if limits.age is not None:
        for record in movable:
            if (now - record.moment).total_seconds() > limits.age:
                removals.append(Removal(record, whole=True, reason="age"))
                gone.add(record.id)
    if limits.count is not None:
        surplus = len(ordered) - len(gone) - limits.count
        kept = [r for r in ordered if r.id not in gone]
        for record in islice(_most_repeated(kept, may_go, kind), max(surplus, 0)):
            removals.append(Removal(record, whole=True, reason="count"))
            gone.add(record.id)
    left = [r for r in ordered if r.id not in gone]
    freed = sum(_size(r) for r in ordered if r.id in gone)
    short = limits.free - free_bytes - freed
    above = 0 if limits.bytes is None else sum(map(_size, left)) - limits.bytes
    without: set[str] = set()
    dumps = [r for r in left if r.dump.file]
    for record in _most_repeated(dumps, may_go, kind):
        if max(short, above) <= 0:
            break
        removals.append(Removal(record, whole=False, reason="free" if above <= 0 else "bytes"))
        without.add(record.id)
        short, above = short - record.dump.bytes, above - record.dump.bytes
    for record in _most_repeated(left, may_go, kind):
        if above <= 0:
            break
        removals.append(Removal(record, whole=True, reason="bytes"))
        above -= _size(record) - (record.dump.bytes if record.id in without else 0)
    return removals


def _most_repeated(
    records: Sequence[CrashRecord], movable: set[str], kind_of: Callable[[CrashRecord], str]
) -> Iterator[CrashRecord]:
    """Yield those that may go, the first of the most repeated kind that is left first.

    Args:
        records: By ascending time.
        movable: IDs of those that may go; the others count, but stay.
        kind_of: Tells what is the same.
    """
    counts = Counter(map(kind_of, records))
    newest = {kind_of(record): record.id for record in records if record.dump.file}
    last = frozenset(newest.values())  # dumps, each of which stays as long as its kind does
    waiting: defaultdict[str, deque[CrashRecord]] = defaultdict(deque)
    for record in sorted(records, key=lambda record: record.id in last):
        if record.id in movable:
            waiting[kind_of(record)].append(record)
    # Of kinds that are repeated as often, the one whose next is oldest.
    heap = [(-counts[kind], crashes[0].moment, kind) for kind, crashes in waiting.items()]
    heapify(heap)
    while heap:
        _, _, kind = heappop(heap)
        crashes = waiting[kind]
        yield crashes.popleft()
        counts[kind] -= 1
        if crashes:
            heappush(heap, (-counts[kind], crashes[0].moment, kind))


def _kind(record: CrashRecord, canonical: Callable[[str], str]) -> str:
    signature = record.signature
    head = canonical(signature.id)
    return head if signature.frames or head != signature.id else f"{head} {record.guest}"


def _size(record: CrashRecord) -> int:
    return sum(facts.bytes for facts in record.files.values())
