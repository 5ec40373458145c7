"""The rows of docs/guest-state.md that take a machine of their own: a dump leaves each as it is."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.qemu.run_states import REFUSED_BY_MIGRATION
from tests.oracle.test_run_states import (
    MIGRATED,
    QEMUS,
    dump_under_way,
    ended,
    running_machine,
    status,
)
from tests.support.bare_crashes import bare_machine
from tests.support.doors import run_cli, run_gdb
from tests.support.qtest import Qtest, qtest_arguments
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_LPC_SLOT, _PM_BASE_AT, _ACPI_CONTROL_AT = 31, 0x40, 0x44
_PM_BASE, _PM_ENABLED = 0x600, 0x80
_SUSPEND_TO_RAM = 1 << 13 | 1 << 10  # SLP_EN, and SLP_TYP of S3


def _suspend(machine: QemuMachine, _qmp: RawQmp) -> None:
    """As firmware and a guest do: place the registers of power management, and ask for S3."""
    with Qtest(machine.folder / "qtest") as qtest:
        qtest.set_pci_config(_LPC_SLOT, _PM_BASE_AT, _PM_BASE | 1)
        qtest.set_pci_config(_LPC_SLOT, _ACPI_CONTROL_AT, _PM_ENABLED)
        qtest.ask(f"outw {_PM_BASE + 4:#x} {_SUSPEND_TO_RAM:#x}")


def _break(machine: QemuMachine, _qmp: RawQmp) -> None:
    run_gdb(machine, ["hbreak *0xf0000", "continue"])


def _load_nothing(_machine: QemuMachine, qmp: RawQmp) -> None:
    """A snapshot that is not there leaves a guest in the middle of being loaded."""
    qmp.execute("human-monitor-command", **{"command-line": "loadvm of-nobody"})


def _migrate_to_the_end(_machine: QemuMachine, qmp: RawQmp) -> None:
    qmp.execute("migrate", uri=MIGRATED)


def _leave(_machine: QemuMachine, _qmp: RawQmp) -> None:
    """It gets there by itself."""


@dataclass(frozen=True)
class Reached:
    """A state, and how a guest that runs gets there.

    Attributes:
        state: That state.
        reach: Brings it there.
        program: What it runs.
        arguments: Of QEMU.
        qemu: Which.
        by_gdb: It is dumped through the gdbstub as well, where connecting stops a guest.
    """

    state: str
    reach: Callable[[QemuMachine, RawQmp], None] = _leave
    program: str = "spin"
    arguments: tuple[str, ...] = ()
    qemu: str = "7.2"
    by_gdb: bool = False


_Q35 = ("-M", "q35")
LEFT = {
    "debug": Reached("debug", _break),
    "watchdog": Reached("watchdog", program="watchdog", arguments=("-action", "watchdog=pause")),
    "postmigrate": Reached("postmigrate", _migrate_to_the_end),
    "restore-vm": Reached("restore-vm", _load_nothing),
    "suspended": Reached("suspended", _suspend, arguments=_Q35),
    "suspended, newer": Reached("suspended", _suspend, arguments=_Q35, qemu="newer", by_gdb=True),
}


@contextmanager
def _machine(folder: Path, row: Reached) -> Iterator[tuple[QemuMachine, RawQmp]]:
    command = QEMUS[row.qemu]()
    machine = bare_machine(folder, row.program, *row.arguments, command=command)
    machine.argv += qtest_arguments(machine.folder / "qtest")
    with machine, RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("cont")
        row.reach(machine, qmp)
        wait_until(lambda: status(qmp) == row.state, row.state)
        yield machine, qmp


@pytest.mark.parametrize("name", LEFT)
def test_a_guest_is_left_in_its_state(tmp_path: Path, name: str):
    with _machine(tmp_path, LEFT[name]) as (machine, qmp):
        before = _facts(qmp)
        doors = [("--qmp", machine.qmp_sockets[0])]
        doors += [("--gdb", machine.gdb_socket)] if LEFT[name].by_gdb else []
        for door in doors:
            done = run_cli(*door, "--force", tmp_path / "dump")
            assert done.returncode == 0, done.stderr
            assert _facts(qmp) == before, door


def _facts(qmp: RawQmp) -> Mapping[str, Any]:
    return {
        "status": qmp.execute("query-status"),
        "migration": qmp.execute("query-migrate").get("status"),
        "jobs": qmp.execute("query-block-jobs"),
    }


def test_a_guest_on_its_way_to_another_host_is_refused(tmp_path: Path):
    """The migration waits for word before the last piece: the state is finish-migrate."""
    with running_machine(tmp_path) as (machine, qmp):
        waits = {"capability": "pause-before-switchover", "state": True}
        qmp.execute("migrate-set-capabilities", capabilities=[waits])
        qmp.execute("migrate", uri=MIGRATED)
        # It is stopped first, and waits then.
        wait_until(lambda: qmp.execute("query-migrate")["status"] == "pre-switchover")
        before = _facts(qmp)
        assert status(qmp) == "finish-migrate"
        done = run_cli("--qmp", machine.qmp_sockets[0], tmp_path / "dump")
        assert done.returncode == 2
        assert REFUSED_BY_MIGRATION in done.stderr
        assert _facts(qmp) == before


def test_a_job_on_the_guests_disk_goes_on(tmp_path: Path):
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "copy").write_bytes(bytes(1 << 20))
    drive = f"if=none,id=disk,format=raw,file={tmp_path}/disk"
    with running_machine(tmp_path, "-drive", drive) as (machine, qmp):
        target = {"driver": "file", "filename": str(tmp_path / "copy")}
        qmp.execute("blockdev-add", **{"driver": "raw", "node-name": "copy", "file": target})
        job = {"job-id": "job", "device": "disk", "target": "copy", "sync": "full"}
        qmp.execute("blockdev-mirror", **job)
        wait_until(lambda: qmp.execute("query-block-jobs")[0]["ready"])
        before = _facts(qmp)
        with dump_under_way(machine, qmp, tmp_path) as (process, dump):
            assert qmp.execute("query-block-jobs") == before["jobs"]
            dump.drain()
            assert ended(process)[0] == 0
        assert _facts(qmp) == before


def test_a_debugger_that_comes_meanwhile_keeps_no_guest(tmp_path: Path):
    """Of one that comes to a guest that stands still, QEMU keeps no state."""
    with (
        running_machine(tmp_path) as (machine, qmp),
        dump_under_way(machine, qmp, tmp_path) as (process, dump),
        socket.socket(socket.AF_UNIX) as debugger,
    ):
        debugger.connect(str(machine.gdb_socket))
        debugger.sendall(b"$?#3f")
        assert debugger.recv(1) == b"+"
        dump.drain()
        assert ended(process)[0] == 0
        assert status(qmp) == "running"


def test_a_panic_in_the_moment_of_our_stop_counts(tmp_path: Path):
    """QEMU tells of it by an event alone: the guest was paused already."""
    arguments = ("-action", "panic=pause", *qtest_arguments(tmp_path / "qtest"))
    with (
        running_machine(tmp_path, *arguments) as (machine, qmp),
        dump_under_way(machine, qmp, tmp_path) as (process, dump),
        Qtest(tmp_path / "qtest") as qtest,
    ):
        qtest.ask("outb 0x505 1")
        dump.drain()
        code, said = ended(process)
        assert (code, status(qmp)) == (0, "paused"), said
