"""`pause`: how long a guest that runs stands still for what is taken of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.oracle.test_live import capabilities_of, command_of
from tests.support.bare_guests import counting_arguments
from tests.support.crash_agent import CrashAgent, run_collector
from tests.support.doors import guest_status
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu

_BIOS_AT, _BIOS = 0xF0000, bytes.fromhex("fa2e660f")


@pytest.mark.parametrize(
    ("newer", "remark"),
    [(True, None), (False, "pause: not live, but a snapshot: this QEMU hangs the guest")],
    ids=["live", "a snapshot instead"],
)
def test_a_guest_that_runs_is_taken_and_runs_on(tmp_path: Path, newer: bool, remark: str | None):
    arguments = counting_arguments("x86_64", tmp_path, 1)
    with QemuMachine(command_of("x86_64", newer=newer), arguments) as machine:
        guest = {
            "socket": str(machine.qmp_sockets[0]),
            "name": "box",
            "pause": "live",
            "after": "leave",
        }
        with CrashAgent(tmp_path, guests=[guest]).running() as agent:
            agent.wait_connected()
            done = run_collector("trigger", "--config", agent.config, "box")
            assert done.returncode == 0, done.stderr
            (record,) = agent.wait_records(1)
        assert record.dump.file is not None, record
        assert record.dump.complete
        told = [text for text in record.remarks if text.startswith("pause:")]
        assert [text.startswith(remark or "") for text in told] == [True] * (remark is not None)
        with open_dump(agent.store.directory(record.id) / record.dump.file) as dump:
            assert dump.read(_BIOS_AT, len(_BIOS)) == _BIOS
        assert guest_status(machine) == "running"
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            assert capabilities_of(qmp) == []
