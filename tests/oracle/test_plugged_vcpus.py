"""vCPUs that were plugged in another order than they are numbered: whose registers are whose."""

from __future__ import annotations

import filecmp
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from qemu_dump_ext.structures.c_struct import ByteOrder
from tests.support.doors import run_cli
from tests.support.newer_qemu import newer_qemu_command
from tests.support.oracle import OracleDumps, elf_facts
from tests.support.qtest import Qtest, qtest_arguments
from tests.support.raw_gdbstub import RawGdbstub
from tests.support.raw_qmp import RawQmp

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_PSERIES = "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off"
_LONG_MODE = {"cr4": 1 << 5, "efer": 1 << 8, "cr0": 1 << 31 | 1}


@dataclass(frozen=True)
class Pluggable:
    """A machine to which vCPUs can be added.

    Attributes:
        arguments: Of QEMU.
        driver: Type of a vCPU.
        place: Property that numbers it.
        register: Of the stub, that is planted.
        newer: By a newer QEMU.
    """

    target: str
    arguments: tuple[str, ...]
    driver: str
    place: str
    register: str
    newer: bool = False


_X86 = Pluggable(
    "x86_64",
    ("-M", "q35", "-m", "16", "-smp", "1,maxcpus=4,sockets=4"),
    "qemu64-x86_64-cpu,core-id=0,thread-id=0",
    "socket-id",
    "rax",
)
PLUGGABLE = {
    "x86_64": _X86,
    "newer x86_64": Pluggable(**(vars(_X86) | {"newer": True})),
    "s390x": Pluggable(
        "s390x",
        ("-m", "16", "-smp", "1,maxcpus=4", "-cpu", "qemu"),
        "qemu-s390x-cpu",
        "core-id",
        "r1",
    ),
    "ppc64": Pluggable(
        "ppc64",
        ("-M", _PSERIES, "-vga", "none", "-m", "256", "-smp", "1,maxcpus=4", "-cpu", "power9_v2.0"),
        "power9_v2.0-spapr-cpu-core",
        "core-id",
        "r1",
    ),
}


def _plug(machine: QemuMachine, kind: Pluggable, number: int) -> None:
    driver, *others = kind.driver.split(",")
    words = dict(word.split("=") for word in others)
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute(
            "device_add",
            driver=driver,
            id=f"cpu{number}",
            **{kind.place: number, **{name: int(value) for name, value in words.items()}},
        )


def _plant(machine: QemuMachine, values: dict[str, dict[int, int]]) -> None:
    """Set registers, by name and by cpu_index."""
    with RawGdbstub(machine.gdb_socket) as stub:
        numbers = {name: (number, size) for name, number, size in stub.described_registers()}
        for name, by_index in values.items():
            number, size = numbers[name]
            for index, value in by_index.items():
                assert stub.packet(f"Hg{index + 1:x}") == "OK"
                order: ByteOrder = "big" if name == "r1" else "little"
                sent = value.to_bytes(size, order).hex()
                assert stub.packet(f"P{number:x}={sent}") == "OK"


@pytest.fixture(scope="module", params=PLUGGABLE)
def plugged(request: pytest.FixtureRequest) -> Iterator[tuple[QemuMachine, Pluggable]]:
    kind = PLUGGABLE[request.param]
    command = newer_qemu_command() if kind.newer else [f"qemu-system-{kind.target}"]
    with stopped_machine(command, kind.arguments) as machine:
        for number in (3, 1):
            _plug(machine, kind, number)
        _plant(machine, {kind.register: {0: 0x10, 3: 0x43, 1: 0x21}})
        yield machine, kind


@pytest.mark.parametrize("door", ["--qmp", "--gdb"])
@pytest.mark.parametrize("dump_format", ["elf", "kdump-zlib"])
def test_exact_has_the_registers_and_the_order_of_qemu(
    plugged: tuple[QemuMachine, Pluggable], tmp_path: Path, door: str, dump_format: str
):
    machine, _ = plugged
    socket = machine.qmp_sockets[0] if door == "--qmp" else machine.gdb_socket
    words = () if dump_format == "elf" else ("-z",)
    done = run_cli(door, socket, "--exact", *words, tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    native = OracleDumps(machine, tmp_path).take(dump_format)
    assert filecmp.cmp(native, tmp_path / "ours", shallow=False)


def _pids_and_rax(path: Path) -> list[tuple[int, int]]:
    """Return what the prstatus notes of an x86-64 core say, in their order."""
    notes, found = elf_facts(path)["notes"], []
    while notes:
        name_size, size, kind = struct.unpack_from("<III", notes)
        start = 12 + (name_size + 3) // 4 * 4
        if kind == 1:
            descriptor = notes[start:]
            pid, rax = (struct.unpack_from("<I", descriptor, at)[0] for at in (32, 192))
            found.append((pid, rax))
        notes = notes[start + (size + 3) // 4 * 4 :]
    return found


@pytest.fixture
def plugged_again(tmp_path: Path) -> Iterator[QemuMachine]:
    """Three vCPUs; the one that was added last was there before, and removed.

    QEMU 7.2 crashes there.
    """
    arguments = [*_X86.arguments, *qtest_arguments(tmp_path / "qtest")]
    with stopped_machine(newer_qemu_command(), arguments) as machine:
        _plug(machine, _X86, 1)
        _plug(machine, _X86, 3)
        with RawQmp(machine.qmp_sockets[1]) as qmp, Qtest(tmp_path / "qtest") as qtest:
            # As the guest's ACPI does it: choose the interface, then select and eject.
            qtest.ask("outl 0xcd8 0")
            qmp.execute("device_del", id="cpu1")
            qtest.ask("outl 0xcd8 1")
            qtest.ask("outb 0xcdc 8")
            qmp.wait_for_event("DEVICE_DELETED")
        _plug(machine, _X86, 1)
        _plant(
            machine, {"rax": {0: 0x10, 3: 0x43, 1: 0x21}, "efer": dict.fromkeys((0, 3, 1), 0x500)}
        )
        yield machine


def test_a_vcpu_that_was_removed_and_added_again(plugged_again: QemuMachine, tmp_path: Path):
    socket = plugged_again.qmp_sockets[0]
    done = run_cli("--qmp", socket, "--exact", tmp_path / "exact")
    assert done.returncode == 0, done.stderr
    assert filecmp.cmp(OracleDumps(plugged_again, tmp_path).elf, tmp_path / "exact", shallow=False)
    done = run_cli("--qmp", socket, tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert _pids_and_rax(tmp_path / "ours") == [(1, 0x10), (4, 0x43), (2, 0x21)]


def test_the_default_says_where_the_order_of_the_kernel_is_not_known(tmp_path: Path):
    with stopped_machine(["qemu-system-x86_64"], _X86.arguments) as machine:
        for number in (3, 1):
            _plug(machine, _X86, number)
        done = run_cli("--qmp", machine.qmp_sockets[0], tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert "vCPUs were plugged in the order 0, 3, 1" in done.stderr
    assert "the kernel may count them otherwise" in done.stderr
