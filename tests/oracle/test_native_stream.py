"""QEMU's own dump as a source of memory: what it leaves behind, where it works and where not."""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_dump_ext.errors import GuestMemoryFaultError, MonitorAnswerError, SourceError
from qemu_dump_ext.guest.access import DescriptorMonitor, GuestAccess
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.guest_images.machine import BootedGuest, QemuMachine, stopped_machine
from qemu_dump_ext.memory_sources import open_memory
from qemu_dump_ext.memory_sources._pieces import PiecewiseMemory
from qemu_dump_ext.memory_sources.native_stream import DumpedPieces
from qemu_dump_ext.qemu.native_dump import NativeDumps
from qemu_dump_ext.qemu.probe import probe_guest
from qemu_dump_ext.qemu.qmp import connect_qmp
from tests.conftest import loaded_content
from tests.support.doors import child_environment, cli_argv, guest_status, run_cli, run_gdb
from tests.support.newer_qemu import newer_qemu_command
from tests.support.oracle import OracleDumps
from tests.support.processes import Process
from tests.support.raw_qmp import RawQmp, tcp_address_of_qmp
from tests.support.waiting import SECONDS, wait_until

pytestmark = pytest.mark.qemu
MIB = 1 << 20
QEMU = "qemu-system-x86_64"
NEVER_RAN = ["-M", "q35", "-m", "128", "-device", "VGA"]


@pytest.fixture(scope="module", params=["debian", "newer"])
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[QemuMachine]:
    command = [QEMU] if request.param == "debian" else newer_qemu_command()
    arguments = [*loaded_content(tmp_path_factory.mktemp("content")), *NEVER_RAN]
    with stopped_machine(command, arguments) as found:
        yield found


@contextmanager
def opened(
    machine: QemuMachine, source: str = "native_stream", socket: int = 0
) -> Iterator[tuple[GuestMemory, RamBlock]]:
    address = str(machine.qmp_sockets[socket])
    with connect_qmp(address) as monitor:
        access = GuestAccess.by_qmp(monitor)
        context = access.source_context(probe_guest(access).ram_blocks, None)
        with open_memory(source, context) as chosen:
            yield chosen.memory, max(context.ram_blocks, key=lambda block: block.size)


def descriptors_of(pid: int) -> list[str]:
    """Name those that are no sockets: which of those are connected changes."""
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(str(link.readlink()))
    return sorted(name for name in names if "socket:" not in name)


def state_of_dumps(machine: QemuMachine) -> tuple[str, list[str]]:
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        reasons = qmp.execute("query-migrate").get("blocked-reasons", [])
        return qmp.execute("query-dump")["status"], reasons


@pytest.mark.parametrize(("dump_format", "words"), [("elf", ()), ("kdump_zlib", ("-z",))])
def test_exact_dump_is_qemus(machine: QemuMachine, tmp_path: Path, dump_format, words):
    before = descriptors_of(machine.pid)
    ours = tmp_path / "ours"
    qmp = ("--qmp", machine.qmp_sockets[0], "--memory", "native_stream")
    done = run_cli(*qmp, "--exact", *words, ours)
    assert done.returncode == 0, done.stderr
    assert state_of_dumps(machine) == ("completed", [])
    assert descriptors_of(machine.pid) == before
    assert filecmp.cmp(ours, getattr(OracleDumps(machine, tmp_path), dump_format), shallow=False)


def read(memory: GuestMemory, gpa: int, size: int) -> bytearray:
    content = bytearray(size)
    memory.read_into(gpa, memoryview(content))
    return content


@pytest.mark.parametrize("source", ["native_stream", "pmemsave"])
def test_reads_in_any_order_are_the_same(machine: QemuMachine, source: str):
    with opened(machine, source) as (memory, block), opened(machine, "process", 1) as (other, _):
        whole = read(other, block.gpa, block.size)
        assert any(whole)
        assert isinstance(memory, PiecewiseMemory)
        piece = memory._writer.piece_size
        for start, size in [
            (0, MIB),
            (2 * MIB, 4097),
            (2 * MIB + 4097, MIB),  # goes on where the last one ended
            (piece - 5, 10),  # of two pieces
            (0x200FFD, 9),
            (3 * piece, MIB),  # not the piece that was asked for ahead
            (piece, 2 * piece + MIB),
            (block.size - MIB, MIB),
            (block.size - 7, 7),
        ]:
            assert read(memory, block.gpa + start, size) == whole[start:][:size], hex(start)


def test_ranges_are_those_of_blocks(machine: QemuMachine):
    with opened(machine) as (memory, block):
        with pytest.raises(GuestMemoryFaultError):
            read(memory, block.end - 8, 16)
        with pytest.raises(GuestMemoryFaultError):
            read(memory, 0xA0000, 8)


def test_nothing_is_left_behind(machine: QemuMachine):
    before = descriptors_of(machine.pid)
    with opened(machine) as (memory, block):
        for _ in range(20):  # each asks for a piece ahead, which the next one gives up
            read(memory, block.gpa + 2 * MIB, MIB)
            read(memory, block.gpa + 70 * MIB, MIB)
    assert state_of_dumps(machine) == ("completed", [])
    assert descriptors_of(machine.pid) == before
    assert guest_status(machine) == "prelaunch"


def test_qemu_is_not_charged_for_our_memory(machine: QemuMachine):
    with opened(machine) as (memory, block):
        assert isinstance(memory, PiecewiseMemory)
        assert isinstance(memory._writer, DumpedPieces)
        for descriptor in memory._writer._files:
            before = os.fstat(descriptor).st_blocks
            assert before * 512 >= DumpedPieces.piece_size
            read(memory, block.gpa, 3 * DumpedPieces.piece_size)
            assert os.fstat(descriptor).st_blocks == before


@pytest.mark.guest
def test_a_running_guest_runs_again(linux_guest: BootedGuest, tmp_path: Path):
    qmp = ("--qmp", linux_guest.qmp_sockets[0], "--memory", "native_stream")
    done = run_cli(*qmp, "-z", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    assert "VMCOREINFO" not in done.stderr or "was found" in done.stderr
    assert guest_status(linux_guest) == "running"
    # A reader that goes away: the dump fails in the middle.
    done = run_cli(*qmp, "|head -c 1000000 >/dev/null")
    assert done.returncode == 4
    assert guest_status(linux_guest) == "running"


@pytest.mark.guest
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_dump_that_is_killed_ends_qemus(
    linux_guest: BootedGuest, tmp_path: Path, signal_number: signal.Signals
):
    before = descriptors_of(linux_guest.pid)
    words = ["--qmp", linux_guest.qmp_sockets[0], "--memory", "native_stream"]
    with RawQmp(linux_guest.qmp_sockets[1]) as qmp:  # query-dump tells of this one until then
        arguments = {"paging": False, "protocol": "file:/dev/null", "begin": 0, "length": 1}
        qmp.execute("dump-guest-memory", **arguments)
    with Process(
        cli_argv(*words, "-z", "zlib", "--level", "9", tmp_path / "x"),
        env=child_environment(),
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_until(lambda: bytes_of_last_dump(linux_guest) > MIB, "the dump has begun")
        process.send_signal(signal_number)
        assert process.wait(timeout=SECONDS) in {130, -signal.SIGKILL}
    with RawQmp(linux_guest.qmp_sockets[1]) as qmp:
        qmp.execute("cont")  # nobody is left to do it after SIGKILL
    assert state_of_dumps(linux_guest) == ("completed", [])
    assert run_cli(*words, tmp_path / "y").returncode == 0
    # Who is killed between handing over a descriptor and its dump leaves it, until the next dump.
    assert descriptors_of(linux_guest.pid) == before


def bytes_of_last_dump(machine: QemuMachine) -> int:
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        total: int = qmp.execute("query-dump")["total"]
    return total


def test_a_guest_that_ends_is_an_error_of_one_line():
    with stopped_machine([QEMU], NEVER_RAN) as machine, opened(machine) as (memory, block):
        read(memory, block.gpa, MIB)
        machine.stop()
        with pytest.raises(SourceError, match="the guest is gone"):
            read(memory, block.gpa + MIB, 100 * MIB)


def test_a_target_that_qemu_cannot_dump_is_named(tmp_path: Path):
    with stopped_machine(["qemu-system-m68k"], ["-M", "virt", "-m", "16"]) as machine:
        before = descriptors_of(machine.pid)
        qmp = ("--qmp", machine.qmp_sockets[0])
        done = run_cli(*qmp, "--memory", "native_stream", tmp_path / "x")
        assert done.returncode == 3
        assert "native_stream: monitor command 'dump-guest-memory'" in done.stderr
        assert re.search("not (currently )?supported", done.stderr)
        assert not list(tmp_path.iterdir())
        assert descriptors_of(machine.pid) == before


def test_a_descriptor_that_qemu_did_not_take_is_taken_back():
    with stopped_machine([QEMU], [*NEVER_RAN, "-incoming", "defer"]) as machine:
        before = descriptors_of(machine.pid)
        with connect_qmp(str(machine.qmp_sockets[0])) as monitor:
            dumps = DumpedPieces(NativeDumps(monitor, monitor, None))
            with pytest.raises(MonitorAnswerError, match="not allowed during incoming migration"):
                dumps.begin(0, 0, 8)()
            dumps.close()
        assert descriptors_of(machine.pid) == before


@pytest.mark.gdb
def test_without_qmp_it_is_said(machine: QemuMachine, tmp_path: Path):
    done = run_gdb(machine, [f"qemu-dump-guest-memory --memory native_stream {tmp_path / 'x'}"])
    assert "through QMP only, not through the human monitor (--qmp SOCKET)" in done.stderr
    assert not list(tmp_path.iterdir())


def test_over_tcp_it_is_said(tmp_path: Path):
    arguments = ["-qmp", "tcp:127.0.0.1:0,server=on,wait=off"]
    with stopped_machine([QEMU], arguments) as machine, RawQmp(machine.qmp_sockets[1]) as qmp:
        address = tcp_address_of_qmp(qmp)
        done = run_cli("--qmp", address, "--memory", "native_stream", tmp_path / "x")
        assert done.returncode == 3
        assert "a QMP socket of TCP passes no descriptors (a unix socket does)" in done.stderr


class ShiftedQmp:
    """Asks QEMU for another range than it is asked for."""

    def __init__(self, qmp: DescriptorMonitor) -> None:
        self._qmp = qmp

    @property
    def passes_descriptors(self) -> bool:
        return self._qmp.passes_descriptors

    def hand_over(self, descriptor: int, name: str) -> None:
        self._qmp.hand_over(descriptor, name)

    def begin_qmp(
        self, command: str, arguments: dict[str, object] | None = None
    ) -> Callable[[], object]:
        begin = (arguments or {})["begin"]
        assert isinstance(begin, int)
        return self._qmp.begin_qmp(command, {**(arguments or {}), "begin": begin + 4096})


def test_another_range_than_was_asked_for_is_refused(machine: QemuMachine):
    with connect_qmp(str(machine.qmp_sockets[0])) as monitor:
        dumps = DumpedPieces(NativeDumps(monitor, ShiftedQmp(monitor), None))
        with pytest.raises(SourceError, match="another range than it was asked for"):
            dumps.begin(0, 0x200000, 8)()
        dumps.close()
