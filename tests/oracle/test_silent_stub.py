"""A gdbstub that does not answer, or serves somebody else, harms nobody."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.bare_crashes import bare_machine
from tests.support.blocked_target import blocked_target
from tests.support.doors import child_environment, cli_argv, run_cli
from tests.support.raw_gdbstub import RawGdbstub
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[QemuMachine, RawQmp]]:
    folder = tmp_path_factory.mktemp("running")
    with (
        bare_machine(folder, "halt", "-m", "64") as machine,
        RawQmp(machine.qmp_sockets[1]) as qmp,
    ):
        qmp.execute("cont")
        yield machine, qmp


def _impatient_argv(module: str, patience: str, *words: object) -> list[str]:
    """Return a command line that waits 4 s for gdb or QEMU where it usually waits longer.

    Args:
        module: Of `qemu_dump_ext`.
        patience: The name of its constant.
        words: Behind the command.
    """
    argv = cli_argv(*words)
    argv[2] = f"import qemu_dump_ext.{module} as patient; patient.{patience} = 4; {argv[2]}"
    return argv


def _status(qmp: RawQmp) -> str:
    return str(qmp.execute("query-status")["status"])


def test_a_connection_that_was_never_answered_stops_nobody(
    running: tuple[QemuMachine, RawQmp], tmp_path: Path
):
    machine, qmp = running
    qmp.events.clear()
    os.kill(machine.pid, signal.SIGSTOP)
    try:
        words = ("--gdb", machine.gdb_socket, tmp_path / "dump")
        done = subprocess.run(
            _impatient_argv("qemu.socket_kind", "GREETING_SECONDS", *words),
            env=child_environment(),
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.kill(machine.pid, signal.SIGCONT)
    assert done.returncode == 3, done.stderr
    assert "QEMU does not answer gdb" in done.stderr
    # It takes the connection that was given up, which stops the guest, and then the guardian's.
    qmp.wait_for_event("RESUME")
    assert _status(qmp) == "running"


def test_a_guest_whose_qemu_stood_still_in_the_middle_runs_again(
    running: tuple[QemuMachine, RawQmp], tmp_path: Path
):
    machine, qmp = running
    with blocked_target(tmp_path) as target:
        words = ("--gdb", machine.gdb_socket, "--memory", "gdbstub", "--max-pause", "15")
        argv = _impatient_argv("cli.gdb_driver", "_CONNECT_SECONDS", *words, target.path)
        process = subprocess.Popen(argv, env=child_environment(), stderr=subprocess.PIPE, text=True)
        wait_until(target.is_written_to, "the dump is being written")
        os.kill(machine.pid, signal.SIGSTOP)
        target.drain()
        try:
            said = process.communicate(timeout=100)[1]
        finally:
            os.kill(machine.pid, signal.SIGCONT)
        assert process.returncode in {2, 3}, said
        wait_until(lambda: _status(qmp) == "running", "the guest runs")


@pytest.mark.parametrize("target", ["|sleep 60", "fifo"])
def test_the_limit_of_the_pause_holds_behind_gdb(
    running: tuple[QemuMachine, RawQmp], tmp_path: Path, target: str
):
    machine, qmp = running
    with blocked_target(tmp_path) as blocked:
        words = blocked.path if target == "fifo" else target
        done = run_cli("--gdb", machine.gdb_socket, "--max-pause", "2", words, timeout=200)
    assert done.returncode == 2, done.stderr
    assert "the limit of --max-pause" in done.stderr
    assert _status(qmp) == "running"


def test_a_stub_that_serves_another_debugger_is_left_to_it(
    running: tuple[QemuMachine, RawQmp], tmp_path: Path
):
    machine, qmp = running
    with RawGdbstub(machine.gdb_socket) as debugger:
        wait_until(lambda: _status(qmp) == "paused", "the debugger has stopped it")
        done = run_cli("--gdb", machine.gdb_socket, tmp_path / "dump")
        assert done.returncode == 3, done.stderr
        assert "another debugger is connected" in done.stderr
        assert debugger.packet("?")[:1] in {"S", "T"}
        qmp.execute("cont")
    assert _status(qmp) == "running"
