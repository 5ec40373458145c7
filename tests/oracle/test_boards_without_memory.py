"""Boards of which QEMU dumps nothing, or nothing right: they are refused in its words."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.doors import run_cli
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu


def _board(name: str) -> QemuMachine:
    # Which decides itself how much memory it has.
    return QemuMachine(["qemu-system-arm"], ["-S", "-M", name])


def _refusal_of_qemu(machine: QemuMachine, path: Path, dump_format: str) -> str:
    with RawQmp(machine.qmp_sockets[1]) as qmp, pytest.raises(RuntimeError) as refused:
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{path}", format=dump_format)
    return str(refused.value).removeprefix("dump-guest-memory: ")


# Their vCPUs have address spaces of their own, and that of the machine has no RAM.
@pytest.mark.parametrize("board", ["musca-a", "mps3-an524", "microbit", "fby35"])
def test_a_board_without_memory_of_its_own(board: str, tmp_path: Path):
    with _board(board) as machine:
        theirs = _refusal_of_qemu(machine, tmp_path / "native", "elf")
        for words in ((), ("--exact",), ("-z",)):
            done = run_cli("--qmp", machine.qmp_sockets[0], *words, tmp_path / "ours")
            assert done.returncode == 2
            assert f": {theirs} (" in done.stderr
            assert not (tmp_path / "ours").exists()


def test_vcpus_of_different_kinds(tmp_path: Path):
    # One has a floating-point unit. QEMU's ELF core is damaged: its notes are longer than it says.
    with _board("mps2-an521") as machine:
        theirs = _refusal_of_qemu(machine, tmp_path / "native", "kdump-zlib")
        for words in (("--exact",), ("--exact", "-z")):
            done = run_cli("--qmp", machine.qmp_sockets[0], *words, tmp_path / "ours")
            assert done.returncode == 2
            assert f": {theirs} (" in done.stderr
        for others in ((), ("-z",)):
            done = run_cli("--qmp", machine.qmp_sockets[0], "--force", *others, tmp_path / "ours")
            assert done.returncode == 0, done.stderr
