"""Which QEMU a socket is of is found without a look at all others, nor at their sockets."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from qemu_dump_ext.guest_images.machine import stopped_machine
from qemu_dump_ext.qemu import socket_kind, ways
from qemu_dump_ext.qemu.socket_kind import find_way
from qemu_dump_ext.qemu.ways import ways_of

pytestmark = pytest.mark.qemu


def test_who_has_a_socket_is_looked_at_alone(monkeypatch):
    looked: list[int] = []

    def counted(process, tables):
        looked.append(process.pid)
        return ways_of(process, tables)

    with ExitStack() as stack:
        machines = [
            stack.enter_context(stopped_machine(["qemu-system-x86_64"], ["-m", "16"]))
            for _ in range(2)
        ]
        monkeypatch.setattr(socket_kind, "ways_of", counted)
        # Remembered from before the machines, it says nothing of them; they are found all the same.
        monkeypatch.setattr(socket_kind._command_lines, "_texts", {1: "init"})
        monkeypatch.setattr(socket_kind._command_lines, "_taken", float("inf"))
        found = [find_way(str(machine.qmp_sockets[0])) for machine in machines]
        assert [one and one[0].pid for one in found] == [machine.pid for machine in machines]
        # Older than a moment, it is read again for who is not in it.
        monkeypatch.setattr(socket_kind._command_lines, "_taken", float("-inf"))
        for machine in machines:
            looked.clear()
            find_way(str(machine.qmp_sockets[0]))
            assert looked == [machine.pid]


def test_no_more_sockets_are_looked_at_than_its_own(monkeypatch):
    with stopped_machine(["qemu-system-x86_64"], ["-m", "16"]) as machine:
        path = str(machine.qmp_sockets[0])
        expected = find_way(path)
        assert expected is not None
        assert expected[1].use == "qmp"
        monkeypatch.setattr(ways, "unix_sockets", lambda _pid: pytest.fail("all are read"))
        monkeypatch.setattr(ways, "tcp_sockets", lambda _pid: pytest.fail("so are others"))
        assert find_way(path) == expected
