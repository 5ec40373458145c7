"""--snapshot and --max-pause: the guest stands still for a short time, or the dump is given up."""

from __future__ import annotations

import filecmp
import json
import os
from pathlib import Path

import pytest

from qemu_dump_ext.cli.dump_command import main as dump_guest_memory
from qemu_dump_ext.engine import dump as dump_engine
from qemu_dump_ext.errors import DumpWriteError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.guest_images.machine import BootedGuest, QemuMachine
from qemu_dump_ext.pages import _copy_store as memory_snapshot
from qemu_dump_ext.pages.copied_memory import room_for_copy
from qemu_dump_ext.qemu.pause_watch import PauseWatch
from tests.support.doors import guest_status, run_cli
from tests.support.oracle import OracleDumps

MIB = 1 << 20


@pytest.mark.qemu
@pytest.mark.parametrize("source", ["process", "native_stream", "pmemsave"])
@pytest.mark.parametrize(("dump_format", "words"), [("elf", ()), ("kdump_zlib", ("-z",))])
def test_a_dump_of_the_copy_is_qemus(
    bare_machine: QemuMachine,
    bare_native: OracleDumps,
    tmp_path: Path,
    source: str,
    dump_format: str,
    words: tuple[str, ...],
):
    ours = tmp_path / "ours"
    qmp = ("--qmp", bare_machine.qmp_sockets[0], "--memory", source)
    done = run_cli(*qmp, "--snapshot", "--exact", *words, ours)
    assert done.returncode == 0, done.stderr
    assert "of guest memory were copied in memory" in done.stderr
    assert filecmp.cmp(ours, getattr(bare_native, dump_format), shallow=False)
    assert guest_status(bare_machine) == "prelaunch"


@pytest.mark.guest
def test_a_running_guest_stands_still_for_the_copy_only(linux_guest: BootedGuest, tmp_path: Path):
    ours = tmp_path / "ours"
    assert guest_status(linux_guest) == "running"
    done = run_cli(
        *("--qmp", linux_guest.qmp_sockets[0], "--snapshot", "-z", "zlib", "--level", "9"),
        *("--threads", 1, "--json", ours),
    )
    assert done.returncode == 0, done.stderr
    assert guest_status(linux_guest) == "running"
    report = json.loads(done.stdout)
    assert report["stopped_seconds"] < report["seconds"] / 2
    verified = run_cli("--qmp", linux_guest.qmp_sockets[0], "--snapshot", tmp_path / "elf")
    assert verified.returncode == 0, verified.stderr


@pytest.mark.guest
@pytest.mark.parametrize("words", [(), ("--snapshot",)])
def test_a_guest_that_stood_still_for_too_long_runs_again(
    linux_guest: BootedGuest, tmp_path: Path, words: tuple[str, ...]
):
    done = run_cli(
        *("--qmp", linux_guest.qmp_sockets[0], "--max-pause", "0.001", *words, tmp_path / "x")
    )
    assert done.returncode == 2
    assert "stood still for 0.001 s, the limit of --max-pause" in done.stderr
    assert not list(tmp_path.iterdir())
    assert guest_status(linux_guest) == "running"


@pytest.mark.qemu
def test_the_search_for_the_kernels_note_does_not_outlast_the_limit(
    bare_machine: QemuMachine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(dump_engine, "make_plan", None)  # what comes behind the search
    # The search looks at the limit itself: the clock beside it would interrupt what comes before.
    monkeypatch.setattr(PauseWatch, "start_clock", lambda *_: None)
    socket = str(bare_machine.qmp_sockets[0])
    assert dump_guest_memory(["--qmp", socket, "--max-pause", "0.001", str(tmp_path / "x")]) == 2
    assert "stood still for 0.001 s, the limit of --max-pause" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.qemu
def test_a_pause_that_is_kept_to(bare_machine: QemuMachine, tmp_path: Path):
    done = run_cli("--qmp", bare_machine.qmp_sockets[0], "--max-pause", "60", tmp_path / "x")
    assert done.returncode == 0, done.stderr


class PatternMemory:
    """Three populated ranges; every page begins with its number."""

    name = "pattern"
    is_slow = False
    ranges = ((0, 8192), (5 * MIB, 11 * MIB), (20 * MIB, 20 * MIB + 4096))

    def __init__(self) -> None:
        self.content = bytearray(24 * MIB)
        for low, high in self.ranges:
            for at in range(low, high, 4096):
                self.content[at : at + 4] = (at // 4096 + 1).to_bytes(4, "little")

    def read_into(self, gpa: int, buffer: memoryview) -> None:
        buffer[:] = self.content[gpa : gpa + len(buffer)]

    def close(self) -> None:
        pass


class SparsePatternMemory(PatternMemory):
    def populated(self, gpa: int, size: int) -> list[tuple[int, int]]:
        clipped = [(max(low, gpa), min(high, gpa + size)) for low, high in self.ranges]
        return [(low, high) for low, high in clipped if low < high]


BLOCKS = (RamBlock(0, 12 * MIB, "a", 0), RamBlock(12 * MIB, 12 * MIB, "b", 0))


@pytest.mark.parametrize("memory", [PatternMemory(), SparsePatternMemory()])
@pytest.mark.parametrize("available", [1 << 40, 0])
def test_a_copy_has_what_the_memory_had(
    memory: PatternMemory, available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory_snapshot, "available_memory", lambda: available)
    with room_for_copy(memory, BLOCKS, tmp_path) as copied:
        advanced: list[int] = []
        copied.take(memory, BLOCKS, advanced.append)
        assert copied.size == sum(advanced) or isinstance(memory, PatternMemory)
        assert copied.size < 21 * MIB
        assert ("in a nameless file" in copied.where) == (not available)
        for block in BLOCKS:
            seen = bytearray(block.size)
            copied.read_into(block.gpa, memoryview(seen))
            assert seen == memory.content[block.gpa : block.end]
            for low, high in copied.populated(block.gpa, block.size):
                assert block.gpa <= low < high <= block.end
        odd = bytearray(5000)
        copied.read_into(5 * MIB - 100, memoryview(odd))
        assert odd == memory.content[5 * MIB - 100 :][:5000]
    assert not list(tmp_path.iterdir())


def test_no_room_for_a_copy_is_said_before_it_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory_snapshot, "available_memory", lambda: 0)
    full = os.statvfs_result((4096, 4096, 1000, 10, 10, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with (
        pytest.raises(DumpWriteError, match="no room for --snapshot: 24 MiB"),
        room_for_copy(PatternMemory(), BLOCKS, tmp_path),
    ):
        pass
