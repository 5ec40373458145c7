"""Answers of the monitor that are longer than the sockets between QEMU and gdb hold."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.support.doors import guest_status, run_cli, run_gdb
from tests.support.newer_qemu import newer_qemu_command
from tests.support.raw_qmp import RawQmp

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

QEMUS: dict[str, Callable[[], list[str]]] = {
    "7.2": lambda: ["qemu-system-x86_64"],
    "newer": newer_qemu_command,
}


@pytest.fixture(scope="module", params=QEMUS)
def crowded(request: pytest.FixtureRequest) -> Iterator[QemuMachine]:
    """A guest with so many devices and vCPUs that its flat views have more than 600 lines."""
    devices = [
        word for slot in range(2, 26) for word in ("-device", f"virtio-rng-pci,addr={slot:#x}")
    ]
    arguments = ["-M", "pc", "-m", "16", "-smp", "40", *devices]
    with stopped_machine(QEMUS[request.param](), arguments) as machine:
        yield machine


def _lines(machine: QemuMachine, command: str) -> int:
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        answer = qmp.execute("human-monitor-command", **{"command-line": command})
    return len(answer.splitlines())


def test_gdb_alone_is_answered_however_long_the_answer_is(crowded: QemuMachine, tmp_path: Path):
    assert _lines(crowded, "info mtree -f") > 600
    words = ["qemu-dump-guest-memory --exact dump", "qemu-info-guest", "info threads"]
    done = run_gdb(crowded, [f"cd {tmp_path}", *words], timeout=300)
    assert "40 vCPUs:" in done.stdout, done.stdout + done.stderr
    assert "Thread 1.40" in done.stdout  # gdb has its connection back
    assert guest_status(crowded) == "prelaunch"
    by_qmp = tmp_path / "by-qmp"
    assert run_cli("--qmp", crowded.qmp_sockets[0], "--exact", by_qmp).returncode == 0
    assert filecmp.cmp(tmp_path / "dump", by_qmp, shallow=False)


def test_a_gdb_of_our_own_is_answered_likewise(crowded: QemuMachine, tmp_path: Path):
    done = run_cli("--gdb", crowded.gdb_socket, tmp_path / "dump", timeout=300)
    assert done.returncode == 0, done.stderr
    assert guest_status(crowded) == "prelaunch"
