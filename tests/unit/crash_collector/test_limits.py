from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from qemu_dump_ext.crash_collector.config.settings import Limits
from qemu_dump_ext.crash_collector.record import CrashRecord, FileFacts, UploadFacts
from qemu_dump_ext.crash_collector.store.limits import choose_removals
from tests.support.crashes import make_record

NOW = datetime(2026, 2, 1, tzinfo=UTC)
MIB = 1 << 20
ROOM = 100 << 30


def crash(day: int, signature: str = "a", *, dump: bool = True) -> CrashRecord:
    """Of 1 MiB, and 10 MiB of dump."""
    record = make_record(signature=signature * 16, time=f"2026-01-{day:02}T00:00:00.000000+00:00")
    files = {"dmesg.txt": FileFacts(MIB, "")} | (
        {"vmcore.kdump": FileFacts(10 * MIB, "")} if dump else {}
    )
    facts = replace(record.dump, file="vmcore.kdump" if dump else None, bytes=10 * MIB * dump)
    return replace(record, id=f"{day}{signature}", files=files, dump=facts)


def chosen(
    records: Sequence[CrashRecord], limits: Limits, free: int = ROOM, *, needs_upload: bool = False
) -> list[str]:
    removals = choose_removals(records, limits, now=NOW, free_bytes=free, needs_upload=needs_upload)
    return [f"{'crash' if r.whole else 'dump'} {r.record.id} {r.reason}" for r in removals]


def test_nothing_goes_within_the_limits():
    assert chosen([crash(1), crash(2)], Limits()) == []


def test_old_crashes_go_first_then_those_above_the_count():
    records = [crash(day) for day in (30, 2, 1, 31)]
    assert chosen(records, Limits(age=20 * 86400.0)) == ["crash 1a age", "crash 2a age"]
    assert chosen(records, Limits(age=30 * 86400.0, count=1)) == [
        "crash 1a age",
        "crash 2a count",
        "crash 30a count",
    ]


def test_crash_of_the_future_is_not_old():
    future = replace(crash(1), time="2036-01-01T00:00:00.000000+00:00")
    assert chosen([future], Limits(age=1.0)) == []


@pytest.mark.parametrize(
    ("mib", "expected"),
    [
        (44, []),
        (43, ["dump 2a bytes"]),
        (25, ["dump 2a bytes", "dump 3a bytes"]),
        (24, ["dump 2a bytes", "dump 3a bytes"]),
        (23, ["dump 2a bytes", "dump 3a bytes", "dump 1b bytes"]),
        (4, ["dump 2a bytes", "dump 3a bytes", "dump 1b bytes", "dump 4a bytes"]),
        (
            2,
            [
                *("dump 2a bytes", "dump 3a bytes", "dump 1b bytes", "dump 4a bytes"),
                *("crash 2a bytes", "crash 3a bytes"),
            ],
        ),
    ],
)
def test_dumps_that_there_are_more_of_go_before_the_last_of_a_signature(mib, expected):
    records = [crash(1, "b"), crash(2), crash(3), crash(4)]
    assert chosen(records, Limits(bytes=mib * MIB)) == expected


def test_only_one_of_its_kind_outlives_what_is_repeated():
    records = [crash(1, "b"), crash(2), crash(3), crash(4, "c"), crash(5, "c"), crash(6, "c")]
    assert chosen(records, Limits(count=3)) == [
        "crash 4c count",
        "crash 2a count",
        "crash 5c count",
    ]
    assert chosen(records, Limits(count=2))[-1] == "crash 1b count"  # a limit is a limit


def test_last_dump_of_a_kind_outlives_crashes_without():
    records = [crash(1), crash(2, dump=False), crash(3, dump=False)]
    assert chosen(records, Limits(count=1)) == ["crash 2a count", "crash 3a count"]


def test_signature_without_frames_makes_no_kind_of_crashes_of_two_guests():
    def hung(day: int, guest: str) -> CrashRecord:
        record = crash(day)
        return replace(record, guest=guest, signature=replace(record.signature, frames=()))

    records = [hung(1, "web1"), hung(2, "web2"), hung(3, "web2")]
    assert chosen(records, Limits(count=2)) == ["crash 2a count"]
    assert chosen([replace(one, guest="web1") for one in records], Limits(count=2)) == [
        "crash 1a count"
    ]


def test_full_disk_takes_dumps_and_no_crash():
    records = [crash(1), crash(2)]
    assert chosen(records, Limits(free=1 << 40)) == ["dump 1a free", "dump 2a free"]
    assert chosen(records, Limits(free=ROOM + 10 * MIB)) == ["dump 1a free"]


def test_held_and_not_uploaded_crashes_stay():
    held = replace(crash(1), held=True)
    uploaded = replace(crash(2), uploaded=UploadFacts("s3://x", "t"))
    limits = Limits(bytes=0, count=1, age=1.0)
    assert chosen([held, uploaded, crash(3)], limits, needs_upload=True) == ["crash 2a age"]
    assert chosen([held], limits) == []
