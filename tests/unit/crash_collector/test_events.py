from __future__ import annotations

import re

import pytest

from qemu_dump_ext.crash_collector.watch.console import ConsoleLog, read_tail
from qemu_dump_ext.crash_collector.watch.events import (
    cause_of_event,
    cause_of_status,
    waits_for_stop,
)
from qemu_dump_ext.crash_collector.watch.heartbeat import Stillness
from qemu_dump_ext.crash_collector.watch.panic_action import panic_action


def event(name: str, **data: object) -> dict[str, object]:
    return {"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}}


@pytest.mark.parametrize(
    ("message", "kind", "detail"),
    [
        (event("GUEST_PANICKED", action="pause"), "guest-panicked", "the guest panicked"),
        (
            event("GUEST_PANICKED", action="run", info={"type": "s390", "psw-addr": 7}),
            "guest-panicked",
            "the guest panicked: type s390, psw-addr 7",
        ),
        (event("GUEST_CRASHLOADED", action="run"), "crashloaded", "crash kernel"),
        (event("WATCHDOG", action="reset"), "watchdog", "the watchdog fired: reset"),
        (
            event("MEMORY_FAILURE", recipient="guest", action="fatal"),
            "memory-failure",
            "action fatal",
        ),
        (event("SHUTDOWN", guest=True, reason="guest-panic"), "shutdown", "guest-panic"),
        (event("RESET", guest=True, reason="guest-reset"), "reset", "guest-reset"),
    ],
    ids=lambda value: value["event"] if isinstance(value, dict) else "",
)
def test_event_is_a_crash(message, kind, detail):
    cause = cause_of_event(message)
    assert cause is not None
    assert (cause.kind, cause.event) == (kind, message)
    assert detail in cause.detail


@pytest.mark.parametrize(
    "message",
    [
        event("STOP"),
        event("SHUTDOWN", guest=False, reason="host-qmp-quit"),
        event("RESET", guest=False, reason="host-qmp-system-reset"),
        event("MEMORY_FAILURE", action="ignore"),
        event("SOMETHING_NEW"),
        {"event": "SHUTDOWN"},
        {"event": "RESET", "data": "odd"},
        {},
    ],
    ids=str,
)
def test_event_is_none(message):
    assert cause_of_event(message) is None


def test_run_state_is_a_crash_if_qemu_stopped_the_guest():
    found = {status: cause_of_status(status) for status in ("internal-error", "paused", "io-error")}
    assert {status: cause and cause.kind for status, cause in found.items()} == {
        "internal-error": "internal-error",
        "paused": None,
        "io-error": "io-error",
    }
    assert waits_for_stop(event("GUEST_PANICKED", action="pause"))
    assert not waits_for_stop(event("GUEST_PANICKED", action="run"))


@pytest.mark.parametrize(
    ("words", "action"),
    [
        ("qemu -m 64", "shutdown"),
        ("qemu -no-shutdown", "pause"),
        ("qemu --action panic=none", "none"),
        ("qemu -action reboot=reset,panic=pause -no-shutdown", "pause"),
        ("qemu -action shutdown=pause", "pause"),
        ("qemu -action panic=exit-failure -no-shutdown", "exit-failure"),
    ],
)
def test_panic_action_is_read_from_the_command_line(words, action):
    assert panic_action(tuple(words.split())) == action


def test_stillness_is_told_once_and_again_after_life():
    clock = iter(range(0, 100, 10)).__next__
    stillness = Stillness(20, lambda: float(clock()))
    seen = [stillness.see(sign) for sign in ("a", "a", "a", "a", "b", "b", None, "b", "b", "b")]
    assert seen == [None, None, 20, None, None, None, None, None, None, 20]


def test_console_tells_new_lines_only(tmp_path):
    path = tmp_path / "console"
    path.write_text("Oops: of yesterday\n")
    console = ConsoleLog(path, [re.compile("Oops|BUG:")])
    assert console.look() is None
    with path.open("a") as file:
        file.write("fine\nOo")
        file.flush()
        assert console.look() is None
        file.write("ps: now\r\nBUG: later\n")
    assert console.look() == "Oops: now"
    assert console.look() is None
    path.write_text("BUG: x\n")  # begun anew
    assert console.look() == "BUG: x"
    with path.open("ab") as file:
        file.write(b"\xff" * 3_000_000 + b"BUG: y\n")
    line = console.look()
    assert line is not None
    assert len(line) <= 4096
    assert ConsoleLog(tmp_path / "none", []).look() is None
    assert len(read_tail(path) or b"") == 256 << 10
    assert read_tail(tmp_path / "none") is None
