"""A guest whose events fill every gap: QEMU sends some before its greeting and right behind it."""

from __future__ import annotations

from qemu_dump_ext.qemu.qmp import connect_qmp
from tests.support.bare_crashes import bare_machine
from tests.support.raw_qmp import RawQmp

_CONNECTIONS = 100  # about one in six met an event that it did not expect


def test_events_before_and_behind_the_greeting_are_no_answers(tmp_path):
    with bare_machine(tmp_path, "reset") as machine:
        with RawQmp(machine.qmp_sockets[0]) as qmp:
            qmp.execute("cont")
        for _ in range(_CONNECTIONS):
            with connect_qmp(str(machine.qmp_sockets[1])) as monitor:
                assert monitor.qmp("query-status")["running"] in {True, False}
