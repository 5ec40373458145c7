from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_dump_ext.crash_collector.agent.journal import GuestState, Journal, replay
from qemu_dump_ext.crash_collector.record import CrashCause
from qemu_dump_ext.errors import DumpWriteError

CRASH_ID = "a/20260131T120000.000001Z-0123456789abcdef"
CAUSE = CrashCause("guest-panicked", "the guest panicked", {"event": "GUEST_PANICKED"})


def journal_of(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


def test_what_is_set_is_known_to_the_next_one(tmp_path):
    journal = journal_of(tmp_path)
    state = GuestState("1:2", CAUSE, "2026-01-31T12:00:00.000000+00:00", stopped=True)
    journal.set("a", state)
    journal.set("b", GuestState("3:4", handled="guest-panicked"))
    assert journal_of(tmp_path).states == {"a": state, "b": journal.states["b"]}
    journal.change("a", stopped=False, cause=None, stored=CRASH_ID)
    journal.change("b", handled=None)
    found = journal_of(tmp_path).states
    assert set(found) == {"a"}
    assert (found["a"].stored, found["a"].stopped, found["a"].qemu) == (CRASH_ID, False, "1:2")
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


DEEP = b"[" * 100_000 + b"]" * 100_000
ODD_LINES = [
    b"{}",
    b"[]",
    b"\xff",
    b'{"guest": "a", "odd": 1}',
    b'{"guest":"a","cause":{"x":1}}',
    b'{"guest": "a", "qemu": "q", "stopped": "yes"}',
    b'{"guest": "a", "qemu": 7, "stopped": true}',
    b'{"guest": "a", "qemu": "q", "cause": [], "stopped": true}',
    b'{"guest": "a", "qemu": "q", "time": "yesterday", "stopped": true}',
    b'{"guest": "a", "qemu": "q", "time": "2026-01-31T12:00:00", "stopped": true}',
    b'{"guest": "a", "qemu": "q", "time": "0001-01-01T00:00:00+14:00", "stopped": true}',
    b'{"guest": "a", "qemu": "q", "stored": "../../x"}',
    b'{"guest": "../x", "qemu": "q", "stopped": true}',
    b'{"guest": "%s", "qemu": "q", "stopped": true}' % (b"x" * 300),
    b'{"guest": ["a"], "qemu": "q", "stopped": true}',
    b'{"guest": "a", "qemu": %s}' % DEEP,
    DEEP,
]


@pytest.mark.parametrize("line", ODD_LINES, ids=lambda line: line[:60].decode("utf-8", "replace"))
def test_odd_line_is_passed_over(line):
    good = b'{"guest": "g", "qemu": "q", "stopped": true}'
    assert replay([line, good, b""]) == {"g": GuestState("q", stopped=True)}


def test_damaged_journal_is_set_aside_and_what_is_good_is_kept(tmp_path, caplog):
    good = b'{"guest": "g", "qemu": "q", "stopped": true}'
    content = b"\n".join([*ODD_LINES, good, b""])
    (tmp_path / "journal").write_bytes(content)
    journal = journal_of(tmp_path)
    assert journal.states == {"g": GuestState("q", stopped=True)}
    (aside,) = tmp_path.glob("journal.damaged-*")
    assert aside.read_bytes() == content
    assert f"{len(ODD_LINES)} of {len(ODD_LINES) + 1} lines make no sense" in caplog.text
    caplog.clear()
    assert journal_of(tmp_path).states == journal.states
    assert not caplog.text


def test_journal_that_is_none_is_set_aside(tmp_path, caplog):
    (tmp_path / "journal").mkdir()
    journal = journal_of(tmp_path)
    journal.set("a", GuestState("1:2", stopped=True))
    assert "it is a directory" in caplog.text
    (tmp_path / "journal").write_bytes(bytes(17 << 20))
    assert journal_of(tmp_path).states == {}
    assert "it has more than" in caplog.text


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
