"""--live: the guest runs, and its dump is of one moment all the same."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.engine.live_guest import live_guest
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.memory_sources import AUTO
from qemu_dump_ext.plan.request import DumpRequest, Live
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.sinks import open_sink
from tests.support.bare_guests import (
    COUNTING,
    PAGES,
    CountingGuest,
    counting_arguments,
    idle_arguments,
    torn_pages,
)
from tests.support.newer_qemu import newer_qemu_command
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

_NEWER = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm", "riscv64": "qemu-system-riscv"}
_ROWS = [(target, newer) for target in COUNTING for newer in (False, True)]
_VCPUS = 4
_TAKEN = 3


def command_of(target: str, *, newer: bool) -> list[str]:
    """Return how QEMU's command line begins."""
    if newer:
        return newer_qemu_command(target, _NEWER[target])
    command = [f"qemu-system-{target}"]
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    return command


def capabilities_of(qmp: RawQmp) -> list[str]:
    """Return the migration capabilities that are set."""
    known = qmp.execute("query-migrate-capabilities")
    return [one["capability"] for one in known if one["state"]]


def counter_of(qmp: RawQmp, guest: CountingGuest) -> int:
    """Return how many numbers a counting guest has drawn."""
    line = f"xp /1xw {guest.counter:#x}"
    return int(qmp.execute("human-monitor-command", **{"command-line": line}).split()[-1], 16)


@pytest.fixture(scope="module", params=_ROWS, ids=lambda row: f"{row[0]}{', newer' * row[1]}")
def counting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[QemuMachine, CountingGuest]]:
    """A guest whose vCPUs never stop to write."""
    target, newer = request.param
    arguments = counting_arguments(target, tmp_path_factory.mktemp("counting"), _VCPUS)
    with QemuMachine(command_of(target, newer=newer), arguments) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            wait_until(lambda: counter_of(qmp, COUNTING[target]) > 16 * PAGES)
        yield machine, COUNTING[target]


def test_every_page_and_register_is_of_one_moment(
    counting: tuple[QemuMachine, CountingGuest], tmp_path: Path
):
    machine, guest = counting
    counters = []
    with connect_qmp(str(machine.qmp_sockets[0])) as monitor:
        for _ in range(_TAKEN):
            with live_guest(GuestAccess.by_qmp(monitor), tmp_path) as live:
                counter = int.from_bytes(live.read(guest.counter, guest.word_size), "little")
                memory = live.read(guest.pages, _VCPUS * PAGES * 4096)
                registers = [vcpu.registers for vcpu in live.vcpus]
                assert live.pause.seconds() > 0
            assert len(registers) == _VCPUS
            assert torn_pages(guest, memory, counter, registers) == []
            counters.append(counter)
    assert sorted(set(counters)) == counters, "the guest runs between them"
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        assert qmp.execute("query-status")["status"] == "running"
        assert capabilities_of(qmp) == []


def test_a_copy_of_several_moments_is_noticed(
    counting: tuple[QemuMachine, CountingGuest], tmp_path: Path
):
    machine, guest = counting
    with connect_qmp(str(machine.qmp_sockets[0])) as monitor:
        access = GuestAccess.by_qmp(monitor)
        with live_guest(access, tmp_path) as first, live_guest(access, tmp_path) as second:
            half = _VCPUS * PAGES * 2048
            memory = first.read(guest.pages, half) + second.read(guest.pages + half, half)
            counter = int.from_bytes(first.read(guest.counter, guest.word_size), "little")
            assert torn_pages(guest, memory, counter, [vcpu.registers for vcpu in first.vcpus])


@pytest.fixture(scope="module", params=_ROWS, ids=lambda row: f"{row[0]}{', newer' * row[1]}")
def idle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[QemuMachine]:
    """A guest in which nothing changes any more."""
    target, newer = request.param
    arguments = idle_arguments(target, tmp_path_factory.mktemp("idle"))
    with QemuMachine(command_of(target, newer=newer), arguments) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            wait_until(lambda: _halted(qmp), "the guest halts")
        yield machine


def _halted(qmp: RawQmp) -> bool:
    text = qmp.execute("human-monitor-command", **{"command-line": "info registers"})
    return any(word in text for word in ("HLT=1", "x0/zero", "X00=0000000045671234")) and (
        "x6/t1    0000000000000123" in text or "x6/t1" not in text
    )


@pytest.mark.parametrize("dump_format", ["elf", "kdump-zlib"])
def test_a_dump_of_a_guest_that_stands_idle_is_qemus(
    idle: QemuMachine, tmp_path: Path, dump_format: str
):
    ours, native = tmp_path / "ours", tmp_path / "native"
    request = DumpRequest(format=dump_format, exact=True, live=Live.REQUIRE)
    with connect_qmp(str(idle.qmp_sockets[0])) as monitor:
        access = GuestAccess.by_qmp(monitor)
        with open_sink(str(ours), force=False, standard_output=None) as sink:
            report = dump(request, access, sink, memory=AUTO, progress=ProgressMeter(None))
    assert report.exit_status == 0, report.lines()
    assert report.memory_source == "background-snapshot"
    with RawQmp(idle.qmp_sockets[1]) as qmp:
        qmp.execute(
            "dump-guest-memory", paging=False, protocol=f"file:{native}", format=dump_format
        )
    with open_dump(ours) as first, open_dump(native) as second:
        assert [note.descriptor for note in first.notes] == [n.descriptor for n in second.notes]
    assert filecmp.cmp(ours, native, shallow=False)
