"""The public API with a real guest: what docs/api.md shows, and what it promises."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import qemu_dump_ext as qd
from qemu_dump_ext.errors import GuestMemoryFaultError
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.conftest import PLANTED_AT
from tests.support.api_page import run_examples
from tests.support.doors import guest_status
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu


@pytest.fixture
def running() -> Iterator[QemuMachine]:
    """A machine that runs: the one of all tests never does."""
    with QemuMachine(["qemu-system-x86_64"], ["-m", "16"]) as machine:
        yield machine


@contextmanager
def still_of(machine: QemuMachine) -> Iterator[qd.StoppedGuest]:
    with qd.connect(str(machine.qmp_sockets[0])) as guest, guest.stopped() as still:
        yield still


def test_examples_of_the_page(bare_machine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_examples(bare_machine.qmp_sockets[0], of_linux=False)
    shown = capsys.readouterr().out
    assert f"{bare_machine.pid} no name x86_64" in shown
    assert "kernel unknown" in shown  # of the one whose QMP socket is free
    assert "x86_64 process 2 vCPUs" in shown
    assert "vm.elf exists" in shown
    assert (tmp_path / "from-a-thread.elf").read_bytes()[:4] == b"\x7fELF"
    assert {path.name for path in tmp_path.iterdir()} == {
        *("vm.kdump", "vm.elf", "vm-of-elf.kdump", "vm.gz", "from-a-thread.elf", "crashes"),
    }


def test_guest_memory_is_that_of_the_monitor(bare_machine):
    with still_of(bare_machine) as still:
        with RawQmp(bare_machine.qmp_sockets[1]) as qmp:
            line = {"command-line": f"xp /64xb {PLANTED_AT:#x}"}
            shown = qmp.execute("human-monitor-command", **line)
        expected = bytes(int(word, 16) for word in shown.split() if word.startswith("0x"))
        assert still.read(PLANTED_AT, 64) == expected
        last = still.ram_blocks[-1]
        for gpa, size in ((last.end - 1, 2), (last.end, 1), (0, 1 << 60), (0, -1)):
            with pytest.raises(GuestMemoryFaultError):
                still.read(gpa, size)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_guest_runs_again_whatever_happens(running, error):
    def fail_while_stopped(guest: qd.Guest) -> None:
        with guest.stopped() as still:
            assert still.vcpus
            assert guest_status(running) == "paused"
            raise error

    with qd.connect(str(running.qmp_sockets[0])) as guest:
        with pytest.raises(error):
            fail_while_stopped(guest)
        assert guest_status(running) == "running"


def test_from_an_event_loop(running, tmp_path):
    async def work() -> tuple[qd.DumpReport, int]:
        ticks = 0
        taken = asyncio.create_task(
            asyncio.to_thread(qd.dump, str(running.qmp_sockets[0]), tmp_path / "dump")
        )
        while not taken.done():  # the loop is not held up
            await asyncio.sleep(0.001)
            ticks += 1
        return taken.result(), ticks

    report, ticks = asyncio.run(work())
    assert report.exit_status == 0
    assert ticks > 1
    assert guest_status(running) == "running"


def test_files(bare_machine, tmp_path):
    target = str(bare_machine.qmp_sockets[0])
    path = tmp_path / "|not a command"
    with path.open("wb") as file:
        qd.dump(target, file)
    assert path.read_bytes()[:4] == b"\x7fELF"
    with pytest.raises(qd.RequestError, match="exists"):
        qd.dump(target, path)
    assert qd.dump(target, path, format="kdump-zlib", force=True).format == "kdump-zlib"
    assert not qd.verify(path).problem_count
    with pytest.raises(qd.RequestError, match="has a descriptor"):
        qd.dump(target, io.BytesIO())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_range_of_a_kdump(bare_machine, tmp_path):
    options = qd.DumpOptions(memory_range=qd.MemoryRange(PLANTED_AT + 1, 1))
    path = tmp_path / "dump"
    qd.dump(str(bare_machine.qmp_sockets[0]), path, format="kdump-zlib", options=options)
    with qd.open_dump(path) as dump:
        assert list(dump.memory_ranges()) == [(PLANTED_AT, 4096)]
        assert len(dump.read(PLANTED_AT, 4096)) == 4096


def test_without_drgn_one_clear_error(bare_machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "drgn", None)
    monkeypatch.delitem(sys.modules, "qemu_dump_ext.api.drgn_program", raising=False)
    with still_of(bare_machine) as still, pytest.raises(qd.RequestError) as caught:
        still.drgn()
    assert str(caught.value).startswith("drgn() needs the Python package drgn, which Python 3.")
    assert str(caught.value).endswith(" -m pip install 'qemu_dump_ext[drgn]')")


def test_drgn_of_a_guest_without_linux(bare_machine):
    with still_of(bare_machine) as still, pytest.raises(qd.SourceError, match="a Linux guest"):
        still.drgn()
