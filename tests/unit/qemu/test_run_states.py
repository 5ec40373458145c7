from __future__ import annotations

import pytest

from qemu_dump_ext.errors import MonitorAnswerError
from qemu_dump_ext.qemu.monitor_text import parse_dump_status, parse_migration, parse_status
from qemu_dump_ext.qemu.run_state import why_not_dumped
from qemu_dump_ext.qemu.run_states import RUN_STATES, Treatment, treatment

STEPS = ("", " (single step mode)")


@pytest.mark.parametrize("step", STEPS)
def test_the_text_of_a_running_guest(step: str):
    assert parse_status(f"VM status: running{step}\n") == "running"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", sorted(set(RUN_STATES) - {"running"}))
def test_the_text_of_every_other_state(state: str, step: str):
    behind = "" if state == "paused" else f" ({state})"
    assert parse_status(f"VM status: paused{step}{behind}\r\n") == state


@pytest.mark.parametrize(
    "text", ["", "running", "VM status: runs", "VM status: paused (a b)", "VM status: \nrunning"]
)
def test_any_other_text_is_none(text: str):
    with pytest.raises(MonitorAnswerError, match="info status"):
        parse_status(text)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("globals:\nstore-global-state: on\n", "none"),
        (
            "globals:\nonly-migratable: off\nMigration status: active\ntotal time: 308 ms\n",
            "active",
        ),
        ("Status: \t\tpostcopy-paused\r\nTime (ms): \t\ttotal=305\r\n", "postcopy-paused"),
        ("", "none"),
    ],
)
def test_the_text_of_a_migration(text: str, status: str):
    assert parse_migration(text) == status


def test_the_text_of_a_dump():
    assert parse_dump_status("Status: active\r\nFinished: 3.00 %\r\n") == "active"
    assert parse_dump_status("unknown command: 'info dump'") == "none"


@pytest.mark.parametrize("state", RUN_STATES)
@pytest.mark.parametrize(
    "migration", ["none", "completed", "active", "cancelling", "of the future"]
)
def test_what_is_refused(state: str, migration: str):
    refusal = why_not_dumped(state, migration, lambda: (7, 2, 22))
    if treatment(state) is Treatment.REFUSE_INCOMING:
        assert refusal == "Dump not allowed during incoming migration."
    elif treatment(state) is Treatment.REFUSE_MIGRATING:
        assert refusal is not None
    else:
        assert (refusal is None) == (migration in {"none", "completed"})


def test_a_state_that_is_not_known_is_left():
    assert treatment("of the future") is Treatment.LEAVE
