from __future__ import annotations

import json

import pytest

from qemu_dump_ext.progress import OneLine, ProgressMeter

MIB = 1 << 20


@pytest.mark.parametrize("columns", [1, 10, 30, 40, 80, 300])
def test_line_fits_and_leaves_nothing_behind(columns):
    """As a terminal would show it: each text begins and ends at its first column."""
    screen = [" "] * columns

    def write(text: str) -> None:
        column = 0
        for character in text:
            if character == "\r":
                column = 0
                continue
            assert column < columns - 1 or columns == 1, "it would begin another line"
            screen[column] = character
            column += 1

    line = OneLine(write, lambda: columns)
    line.show(" 12.3 %  31 of 256 MiB  100 MiB/s  2 s left")
    assert columns < 12 or "".join(screen).startswith(" 12.3 %")
    line.show("  1.0 %")
    line.clear()
    assert "".join(screen).strip() == ""


def test_whole_parts_are_left_out():
    shown: list[str] = []
    OneLine(shown.append, lambda: 30).show(" 12.3 %  31 of 256 MiB  100 MiB/s  2 s left")
    assert shown == ["\r 12.3 %  31 of 256 MiB\r"]


def test_nothing_is_cleared_where_nothing_was_shown():
    shown: list[str] = []
    OneLine(shown.append, lambda: 80).clear()
    assert shown == []


def test_rate_is_that_of_late():
    now = 0.0
    shown: list[str] = []
    meter = ProgressMeter(shown.append, lambda: now)
    meter.start(1000 * MIB)
    for _ in range(10):
        now += 1
        meter.advance(10 * MIB)
    assert "  10 MiB/s  1 min 30 s left" in shown[-1]
    for _ in range(10):
        now += 1
        meter.advance(1 * MIB)
    assert "  1.0 MiB/s" in shown[-1]


def test_a_search_before_there_is_anything_to_count_is_seen():
    now = 0.0
    shown: list[str] = []
    meter = ProgressMeter(shown.append, lambda: now)
    for now in (0.1, 0.3, 0.4, 12.0):  # noqa: B007 - read by the clock
        meter.search("VMCOREINFO")
    assert shown == ["searching for VMCOREINFO  0 s", "searching for VMCOREINFO  12 s"]
    told: list[str] = []
    ProgressMeter(told.append, lambda: now, as_json=True).search("VMCOREINFO")
    assert told == []


def test_programs_get_an_object_a_second():
    now = 0.0
    shown: list[str] = []
    meter = ProgressMeter(shown.append, lambda: now, as_json=True)
    meter.start(8 * MIB)
    for _ in range(8):
        now += 0.5
        meter.advance(MIB)
    told = [json.loads(line)["progress"] for line in shown]
    assert [one["done"] for one in told] == [2 * MIB, 4 * MIB, 6 * MIB, 8 * MIB]
    assert told[1] == {"done": 4 * MIB, "total": 8 * MIB, "rate": 2 * MIB, "seconds_left": 2.0}
