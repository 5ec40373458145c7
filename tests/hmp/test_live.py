"""Live dumps through the proxy, at both doors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.oracle.test_live import capabilities_of, command_of
from tests.support.bare_guests import counting_arguments
from tests.support.doors import guest_status
from tests.support.hmp_proxy import HmpSocket, Proxy, QmpSocket
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu

_BIOS_AT, _BIOS = 0xF0000, bytes.fromhex("fa2e660f")


def test_both_doors_dump_a_guest_that_runs_on(tmp_path: Path):
    arguments = counting_arguments("x86_64", tmp_path, 1)
    by_line, by_qmp = tmp_path / "line", tmp_path / "qmp.elf"
    with (
        QemuMachine(command_of("x86_64", newer=True), arguments) as machine,
        Proxy(tmp_path, "--qmp", machine.qmp_sockets[0], qmp=True) as proxy,
    ):
        with HmpSocket(proxy.socket) as monitor:
            assert monitor.command(f"dump-guest-memory --live {by_line}") == ""
        with QmpSocket(proxy.qmp_socket) as qmp:
            qmp.execute("qmp_capabilities")
            wanted: dict[str, Any] = {
                "paging": False,
                "protocol": f"file:{by_qmp}",
                "x-live": "require",
            }
            answers = qmp.execute("dump-guest-memory", **wanted)
            assert "return" in answers[-1], answers
        assert guest_status(machine) == "running"
        with RawQmp(machine.qmp_sockets[1]) as raw:
            assert raw.execute("query-migrate")["status"] == "completed"
            assert capabilities_of(raw) == []
    for path in (by_line, by_qmp):
        with open_dump(path) as dump:
            assert dump.read(_BIOS_AT, len(_BIOS)) == _BIOS
