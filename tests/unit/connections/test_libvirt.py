from __future__ import annotations

import shlex

import pytest

from qemu_dump_ext.connections._virsh import quoted
from qemu_dump_ext.connections.libvirt import LibvirtMonitor, parse_event
from qemu_dump_ext.errors import SourceError


def test_events_are_read_as_virsh_prints_them():
    assert parse_event("event STOP at 1796030757.070515 for domain 'web1': <null>\n") == {
        "event": "STOP",
        "timestamp": {"seconds": 1796030757, "microseconds": 70515},
    }
    panicked = 'event GUEST_PANICKED at 1796030757.266250 for domain \'web1\': {"action":"pause"}'
    event = parse_event(panicked)
    assert event is not None
    assert (event["event"], event["data"]) == ("GUEST_PANICKED", {"action": "pause"})


def test_a_name_of_a_domain_is_no_data():
    event = parse_event("event STOP at 1.500000 for domain 'a: {\"x\":1}': <null>")
    assert event == {"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 500000}}


@pytest.mark.parametrize("line", ["", "events received: 3", "event stop for domain", "error: no"])
def test_what_is_no_event_is_none(line: str):
    assert parse_event(line) is None


def _told(asked: list[bool], again: object) -> str:
    asked.append(bool(again))
    return ""


@pytest.mark.parametrize(
    ("command", "again"), [("stop", True), ("cont", True), ("system_reset", False), ("quit", False)]
)
def test_what_virsh_may_have_done_is_not_done_twice(
    monkeypatch: pytest.MonkeyPatch, command: str, *, again: bool
):
    asked: list[bool] = []
    monitor = LibvirtMonitor("qemu:///system", "01234567-89ab-cdef-0123-456789abcdef")
    monkeypatch.setattr(monitor._virsh, "ask", lambda _, *, again: _told(asked, again))
    monitor.execute(command)
    assert asked == [again]


@pytest.mark.parametrize("word", ["web1", "it's", "a b", "", '{"a": "\'"}', "$(x)`y`\\"])
def test_words_are_quoted_as_for_a_shell(word: str):
    assert shlex.split(quoted(word)) == [word]


@pytest.mark.parametrize(
    "uri", ["qemu+ssh://host/system", "qemu+tls://host:16514/system", "qemu://host/session"]
)
def test_a_guest_of_another_host_has_no_process_here(uri: str):
    monitor = LibvirtMonitor(uri, "01234567-89ab-cdef-0123-456789abcdef")
    with pytest.raises(SourceError, match="not on this host"):
        monitor._find_process()


@pytest.mark.parametrize(
    "uri", ["qemu:///system", "qemu:///session", "qemu+unix:///system?socket=/run/x"]
)
def test_a_guest_of_this_host_is_looked_for(uri: str):
    monitor = LibvirtMonitor(uri, "01234567-89ab-cdef-0123-456789abcdef")
    with pytest.raises(SourceError, match="no QEMU is to be seen here"):
        monitor._find_process()
