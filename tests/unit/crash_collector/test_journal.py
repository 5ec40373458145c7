from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_dump_ext.crash_collector.agent.journal import GuestState, Journal, replay
from qemu_dump_ext.crash_collector.record import CrashCause
from qemu_dump_ext.errors import DumpWriteError

CAUSE = CrashCause("guest-panicked", "the guest panicked", {"event": "GUEST_PANICKED"})


def journal_of(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


def test_what_is_set_is_known_to_the_next_one(tmp_path):
    journal = journal_of(tmp_path)
    state = GuestState("1:2", CAUSE, "2026-01-31T12:00:00.000000+00:00", stopped=True)
    journal.set("a", state)
    journal.set("b", GuestState("3:4", handled="guest-panicked"))
    assert journal_of(tmp_path).states == {"a": state, "b": journal.states["b"]}
    journal.change("a", stopped=False, cause=None, stored="a/x")
    journal.change("b", handled=None)
    found = journal_of(tmp_path).states
    assert set(found) == {"a"}
    assert (found["a"].stored, found["a"].stopped, found["a"].qemu) == ("a/x", False, "1:2")
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o600


def test_line_that_was_cut_off_does_not_count_and_harms_no_other(tmp_path):
    journal = journal_of(tmp_path)
    journal.set("a", GuestState("1:2", stopped=True))
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'{"guest": "a", "qemu": "1:2", "stop')
    journal = journal_of(tmp_path)
    assert journal.states["a"].stopped
    journal.change("a", stopped=False)
    assert journal_of(tmp_path).states == {}


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"\xff", b'{"guest": "a", "odd": 1}', b'{"guest":"a","cause":{"x":1}}']
)
def test_odd_line_is_passed_over(line):
    good = b'{"guest": "g", "qemu": "q", "stopped": true}'
    assert replay([line, good, b""]) == {"g": GuestState("q", stopped=True)}


def test_what_cannot_be_written_is_not_remembered(tmp_path):
    journal = journal_of(tmp_path)
    journal.set("a", GuestState("1:2", stopped=True))
    path = tmp_path / "journal"
    path.rename(tmp_path / "away")
    path.mkdir()
    with pytest.raises(DumpWriteError, match="cannot write"):
        journal.change("a", stopped=False)
    assert journal.states["a"].stopped


def test_journal_does_not_grow_without_bounds(tmp_path):
    journal = journal_of(tmp_path)
    path = tmp_path / "journal"
    journal.set("kept", GuestState("1:2", stopped=True))
    os.truncate(path, 2 << 20)  # as after very many lines
    journal.set("a", GuestState("3:4", handled="io-error"))
    assert path.stat().st_size < 4096
    assert set(journal_of(tmp_path).states) == {"kept", "a"}
