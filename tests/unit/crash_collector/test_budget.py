from __future__ import annotations

from pathlib import Path

from qemu_dump_ext.crash_collector.collect.budget import DumpBudget
from qemu_dump_ext.crash_collector.config.settings import GuestEntry, Limits, Rate
from qemu_dump_ext.crash_collector.watch.guests import Guest
from tests.support.crashes import make_store

SIGNATURE = "a" * 16
GUEST = Guest("web1", "x", GuestEntry(socket="x", dumps_per_signature=1, rate=Rate(2, 60.0)))


def limits_of_refusals(
    directory: Path, *asked: tuple[str | None, bool], free: int = 0
) -> list[str | None]:
    budget = DumpBudget(make_store(directory), Limits(free=free))
    with budget.collecting() as allowance:
        refusals = [
            allowance.refusal(GUEST, signature, asked_for=asked_for)
            for signature, asked_for in asked
        ]
    return [refusal.limit if refusal else None for refusal in refusals]


def test_dumps_of_one_signature_are_limited_and_those_of_none_by_the_rate_alone(tmp_path):
    asked = [(SIGNATURE, False), (SIGNATURE, False), (None, False), (None, False)]
    refused = [None, "dumps_per_signature", None, "rate"]
    assert limits_of_refusals(tmp_path, *asked) == refused


def test_dump_that_somebody_asks_for_is_always_taken_and_counts_for_no_rate(tmp_path):
    asked = [(SIGNATURE, True)] * 5 + [(None, False)] * 3
    assert limits_of_refusals(tmp_path, *asked) == [None] * 7 + ["rate"]


def test_full_disk_refuses_also_what_somebody_asks_for(tmp_path):
    assert limits_of_refusals(tmp_path, (None, True), free=1 << 62) == ["free"]
