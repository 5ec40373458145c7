"""QEMU answers on a monitor's socket, too, what it still did for who was connected before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.qemu._guardian_program import release
from qemu_dump_ext.qemu.qmp import connect_qmp
from tests.support.blocked_target import blocked_target
from tests.support.newer_qemu import newer_qemu_command
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

_SIZE = 1 << 20
"""Bytes; more than a pipe holds."""
_CONNECTED = "03"
QEMUS: dict[str, Callable[[], list[str]]] = {
    "own": lambda: ["qemu-system-x86_64"],
    "newer": newer_qemu_command,
}


@pytest.fixture(scope="module", params=QEMUS)
def machine(request: pytest.FixtureRequest) -> Iterator[QemuMachine]:
    with QemuMachine(QEMUS[request.param](), ["-m", "16"]) as qemu:
        yield qemu


def _is_greeted(path: Path) -> bool:
    """Tell whether QEMU has taken a connection at a socket."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(line[-1] == str(path) and line[5] == _CONNECTED for line in lines)


def _come_after_somebody(
    machine: QemuMachine, folder: Path, come: Callable[[str], object]
) -> object:
    """Let somebody stop the guest and leave while QEMU saves its memory; return what comes next."""
    path = machine.qmp_sockets[0]
    with ThreadPoolExecutor(1) as pool, blocked_target(folder) as target:
        with RawQmp(path) as qmp:
            qmp.execute("stop")
            arguments = {"val": 0, "size": _SIZE, "filename": str(target.path)}
            # As the first question of a client of the package qemu.qmp.
            request = {"execute": "pmemsave", "arguments": arguments, "id": "__qmp#00000"}
            qmp._socket.sendall(json.dumps(request).encode() + b"\n")
            wait_until(target.is_written_to, "QEMU saves memory")
        wait_until(lambda: not _is_greeted(path), "QEMU has seen that nobody is there")
        found = pool.submit(come, str(path))
        wait_until(lambda: _is_greeted(path), "QEMU has taken the next one")
        target.drain()
        return found.result()


def test_a_guardian_takes_no_answer_that_is_not_its_own(machine: QemuMachine, tmp_path: Path):
    _come_after_somebody(machine, tmp_path, lambda path: release("qmp", path))
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        assert qmp.execute("query-status")["status"] == "running"


def test_a_client_takes_no_answer_that_is_not_its_own(machine: QemuMachine, tmp_path: Path):
    def ask(path: str) -> object:
        with connect_qmp(path) as qmp:
            return qmp.qmp("query-status")["status"]

    assert _come_after_somebody(machine, tmp_path, ask) == "paused"
