"""Guests without a QMP socket for the agent: watched by a human monitor, by name, by PID."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.collector.test_check_config import check
from tests.support.bare_crashes import bare_machine
from tests.support.crash_agent import CrashAgent, run_collector
from tests.support.doors import guest_status
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu
_NAME = f"bare-{os.getpid()}"
_PANICS = ("-action", "panic=pause")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[QemuMachine]:
    """A guest that panics when it runs, with a human monitor."""
    monitor = ("-monitor", f"unix:{tmp_path}/hmp,server=on,wait=off", "-name", _NAME)
    with bare_machine(tmp_path, "panic", *_PANICS, *monitor) as found:
        yield found


@pytest.mark.parametrize("way", ["monitor", "guest", "pid"])
def test_a_panic_is_collected(machine: QemuMachine, tmp_path: Path, way: str):
    guest = {"monitor": str(tmp_path / "hmp"), "guest": _NAME, "pid": machine.pid}[way]
    entry = {way: guest, "name": "box", "format": "elf"}
    # The first QMP socket is taken: by name and PID, the second one, or the human monitor, is left.
    with RawQmp(machine.qmp_sockets[0]) as qmp, CrashAgent(tmp_path, guests=[entry]).running() as a:
        a.wait_connected()
        qmp.execute("cont")
        [record] = a.wait_records()
    assert (record.cause.kind, record.guest) == ("guest-panicked", "box")
    assert record.qemu.pid == machine.pid
    assert record.dump.file is not None, record.dump.reason
    with open_dump(a.store.directory(record.id) / record.dump.file) as dump:
        assert sum(size for _, size in dump.memory_ranges()) >= 16 << 20
    assert guest_status(machine) == "guest-panicked"


def test_a_guest_that_runs_is_dumped_by_its_human_monitor_and_runs_again(tmp_path: Path):
    monitor = ("-monitor", f"unix:{tmp_path}/hmp,server=on,wait=off")
    with bare_machine(tmp_path, "spin", *monitor) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
        entry = {"monitor": str(tmp_path / "hmp"), "name": "box"}
        with CrashAgent(tmp_path, guests=[entry]).running() as agent:
            agent.wait_connected()
            done = run_collector("trigger", "--config", agent.config, "box")
            assert done.returncode == 0, done.stdout + done.stderr
            [record] = agent.records()
        assert record.dump.file is not None, record.dump.reason
        assert guest_status(machine) == "running"


def test_what_a_user_can_do_is_said(machine: QemuMachine, tmp_path: Path, capsys):
    entries = [{"monitor": f"{tmp_path}/hmp"}, {"guest": _NAME}, {"pid": machine.pid}]
    _, told = check(tmp_path, capsys, guests=entries)
    assert told.count("a panic pauses it") == 3, told
    _, absent = check(tmp_path, capsys, guests=[{"guest": "absent"}])
    assert "absent: guest:absent: no guest is called 'absent'" in absent
    qmp = {"monitor": str(machine.qmp_sockets[0]), "name": "one"}
    _, other = check(tmp_path, capsys, guests=[qmp, {"monitor": "/absent", "name": "two"}])
    assert "this is QMP, not a monitor: watch it by `socket`" in other
    assert "two: /absent: there is no such socket now" in other
    status, wrong = check(tmp_path, capsys, guests=[{"pid": 1, "guest": "x"}])
    assert (status, "a guest has one of `socket`" in wrong) == (2, True)


def test_a_human_monitor_cannot_change_what_a_panic_does(tmp_path: Path, capsys):
    monitor = ("-monitor", f"unix:{tmp_path}/hmp,server=on,wait=off")
    with bare_machine(tmp_path, "halt", *monitor):
        _, told = check(tmp_path, capsys, guests=[{"monitor": f"{tmp_path}/hmp"}])
    assert "start QEMU with -action panic=pause" in told
    assert "the agent sets that" not in told
