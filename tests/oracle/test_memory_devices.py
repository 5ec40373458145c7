"""What of each memory device is dumped, against QEMU's own dump of the same machine."""

from __future__ import annotations

import filecmp
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from qemu_dump_ext.memory_sources import AUTO
from tests.support.doors import run_cli
from tests.support.newer_qemu import newer_qemu_command
from tests.support.oracle import OracleDumps, elf_facts
from tests.support.qtest import ARM_VIRT, Qtest, VirtioMem, qtest_arguments, virtio_mem
from tests.support.raw_qmp import RawQmp
from tests.support.ways import every_way, half_of, take_dumps

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_OWN_QEMU = ["qemu-system-x86_64"]
_MIB = 1 << 20
_SLOT, _BLOCK, _MEMORY_AT = 9, _MIB, 1 << 32
_USABLE = 12 * _MIB
_SLOWEST = ("gdbstub", "kdump-zlib")


@dataclass(frozen=True)
class Device:
    """A device with memory.

    Attributes:
        region: As the flat view names it.
        arguments: Of QEMU; `FOLDER` stands for one with the files.
        bar: PCI slot and number of the BAR that is its memory, or None.
    """

    region: str
    arguments: tuple[str, ...]
    bar: tuple[int, int] | None = None


def _backend(name: str, size: str = "2M") -> tuple[str, ...]:
    return ("-object", f"memory-backend-ram,id={name},size={size},share=on")


_READ_ONLY = "memory-backend-file,id=ro,size=2M,mem-path=FOLDER/file,readonly=on,share=on"
DEVICES = {
    "ram": Device("pc.ram", ()),
    "option ROM space": Device("pc.rom", ()),
    "flash": Device(
        "system.flash0", ("-drive", "if=pflash,format=raw,unit=0,readonly=on,file=FOLDER/file")
    ),
    "pc-dimm": Device("dimm", (*_backend("dimm"), "-device", "pc-dimm,memdev=dimm")),
    "nvdimm": Device("nv", (*_backend("nv"), "-device", "nvdimm,memdev=nv")),
    "nvdimm, unarmed": Device("un", (*_backend("un"), "-device", "nvdimm,memdev=un,unarmed=on")),
    "nvdimm, with a label": Device(
        "label", (*_backend("label", "4M"), "-device", "nvdimm,memdev=label,label-size=128K")
    ),
    "nvdimm, read only": Device(
        "ro", ("-object", _READ_ONLY, "-device", "nvdimm,memdev=ro,unarmed=on")
    ),
    "virtio-pmem": Device("pm", (*_backend("pm"), "-device", "virtio-pmem-pci,memdev=pm")),
    "virtio-mem, unplugged": Device(
        "vm", (*_backend("vm", "16M"), "-device", "virtio-mem-pci,memdev=vm,requested-size=0")
    ),
    "ivshmem": Device(
        "iv", (*_backend("iv", "1M"), "-device", "ivshmem-plain,memdev=iv,addr=10"), bar=(16, 2)
    ),
    "video memory": Device("vga.vram", ("-device", "VGA,addr=11,vgamem_mb=1"), bar=(17, 0)),
    "another video memory": Device(
        "bochs-display-vram", ("-device", "bochs-display,addr=12"), bar=(18, 0)
    ),
    "ROM of a PCI device": Device(
        "virtio-net-pci.rom", ("-device", "virtio-net-pci,addr=13"), bar=(19, 8)
    ),
}
_LEFT_OUT = {"flash", "virtio-mem, unplugged"}


@dataclass
class Equipped:
    """A machine with all devices, and what was dumped of it."""

    flat_view: Mapping[str, tuple[int, int]]
    native: Path
    ours: Path
    said: str = field(default="")

    def loads(self, path: Path, device: Device) -> list[tuple[int, int]]:
        """Return what PT_LOADs have of a device's memory."""
        first, end = self.flat_view[device.region]
        segments = [(paddr, paddr + size) for _, paddr, size, _ in elf_facts(path)["loads"]]
        return [(max(a, first), min(b, end)) for a, b in segments if a < end and b > first]


def _flat_view(qmp: RawQmp) -> dict[str, tuple[int, int]]:
    text = qmp.execute("human-monitor-command", **{"command-line": "info mtree -f"})
    view = next(view for view in text.split("FlatView #") if ' AS "memory"' in view)
    found: dict[str, tuple[int, int]] = {}
    for first, last, name in re.findall(r"([0-9a-f]{16})-([0-9a-f]{16}) \([^)]*\): (\S+)", view):
        found.setdefault(name, (int(first, 16), int(last, 16) + 1))
    return found


@pytest.fixture(scope="module", params=["7.2", "newer"])
def command(request: pytest.FixtureRequest) -> list[str]:
    return _OWN_QEMU if request.param == "7.2" else newer_qemu_command()


@pytest.fixture(scope="module")
def equipped(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Equipped:
    folder = tmp_path_factory.mktemp("equipped")
    with (folder / "file").open("wb") as file:
        file.truncate(2 * _MIB)
    arguments = ["-M", "q35,nvdimm=on", "-m", "16M,maxmem=2G,slots=8"]
    for device in DEVICES.values():
        arguments += [word.replace("FOLDER", str(folder)) for word in device.arguments]
    with stopped_machine(command, [*arguments, *qtest_arguments(folder / "qtest")]) as machine:
        with Qtest(folder / "qtest") as qtest:
            places = itertools.count(0xD0000000, 64 * _MIB)
            for device in DEVICES.values():
                if device.bar:
                    slot, bar = device.bar
                    qtest.map_bar(slot, bar, next(places))
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            view = _flat_view(qmp)
        done = run_cli("--qmp", machine.qmp_sockets[0], "--exact", folder / "ours")
        assert done.returncode == 0, done.stderr
        return Equipped(view, OracleDumps(machine, folder).elf, folder / "ours", done.stderr)


@pytest.mark.parametrize("name", DEVICES)
def test_of_each_device_that_is_dumped_which_qemu_dumps(equipped: Equipped, name: str):
    device = DEVICES[name]
    theirs = equipped.loads(equipped.native, device)
    assert bool(theirs) == (name not in _LEFT_OUT)
    assert equipped.loads(equipped.ours, device) == theirs


def test_the_whole_dump_is_that_of_qemu(equipped: Equipped):
    assert filecmp.cmp(equipped.native, equipped.ours, shallow=False)


@dataclass
class Plugging:
    """A machine whose virtio-mem memory is in a memfd, and its driver."""

    machine: QemuMachine
    driver: VirtioMem

    def populated(self) -> int:
        """Return how much of that memory the host has allocated, in bytes."""
        found = [
            link.stat().st_blocks * 512
            for link in Path(f"/proc/{self.machine.pid}/fd").iterdir()
            if "memfd:memory-backend" in str(link.readlink())
        ]
        assert len(found) == 1
        return found[0]

    def plugged_loads(self, path: Path) -> list[tuple[int, int]]:
        """Return first block and number of blocks of each PT_LOAD of the device."""
        return [
            ((paddr - _MEMORY_AT) // _BLOCK, size // _BLOCK)
            for _, paddr, size, _ in elf_facts(path)["loads"]
            if paddr >= _MEMORY_AT
        ]


def _with_virtio_mem(requested: int, folder: Path, options: str = "") -> list[str]:
    backend = "memory-backend-memfd,share=on,id=v0,size=1G"
    device = f"virtio-mem-pci,id=vm0,memdev=v0,addr={_SLOT},block-size={_BLOCK}"
    return [
        *("-M", "q35", "-m", "16M,maxmem=2G,slots=1", "-object", backend),
        *("-device", f"{device},requested-size={requested}{options}"),
        *qtest_arguments(folder / "qtest"),
    ]


@pytest.fixture(scope="module")
def plugging(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plugging]:
    folder = tmp_path_factory.mktemp("plugging")
    arguments = _with_virtio_mem(_USABLE, folder)
    with (
        stopped_machine(command, arguments) as machine,
        virtio_mem(folder / "qtest", _SLOT, _MEMORY_AT, _BLOCK) as driver,
    ):
        yield Plugging(machine, driver)


def test_unplugged_memory_is_neither_dumped_nor_read(plugging: Plugging, tmp_path: Path):
    before = plugging.populated()
    for words in (["--exact"], ["-z", "-R"], ["--snapshot"]):
        ours = tmp_path / "_".join(words)
        done = run_cli("--qmp", plugging.machine.qmp_sockets[0], *words, ours)
        assert done.returncode == 0, done.stderr
    assert plugging.populated() == before == 0
    assert plugging.plugged_loads(tmp_path / "--exact") == []
    assert (tmp_path / "-z_-R").stat().st_size < 2 * _MIB


_STEPS = {
    "the first block": ([0], [], [(0, 1)]),
    "some more": ([1, 2, 7, 9, 200], [], [(0, 3), (7, 1), (9, 1), (200, 1)]),
    "one in the middle given back": ([], [1], [(0, 1), (2, 1), (7, 1), (9, 1), (200, 1)]),
}


@pytest.mark.parametrize("step", _STEPS)
def test_what_is_plugged_is_dumped_in_every_way(
    plugging: Plugging, command: list[str], tmp_path: Path, step: str
):
    plugged, unplugged, expected = _STEPS[step]
    plugging.driver.plug(plugged)
    with RawQmp(plugging.machine.qmp_sockets[1]) as qmp:
        for requested in (0, _USABLE):  # blocks are taken back only while too many are plugged
            qmp.execute("qom-set", path="vm0", property="requested-size", value=requested)
            if not requested:
                plugging.driver.unplug(unplugged)
    native = OracleDumps(plugging.machine, tmp_path)
    assert plugging.plugged_loads(native.elf) == expected
    ways = every_way(sources=(AUTO,))
    if step == "some more":
        # The stub reads slowly.
        half = half_of(every_way(), turn=int(command == _OWN_QEMU))  # the other by the other QEMU
        ways = tuple(way for way in half if (way.source, way.dump_format) != _SLOWEST)
    for way, outcome in take_dumps(plugging.machine, tmp_path, ways, "--exact").items():
        assert outcome.status == 0, outcome.said
        ours = tmp_path / str(way)
        assert filecmp.cmp(native.take(way.dump_format), ours, shallow=False), way
        ours.unlink()


def test_a_device_that_maps_its_memory_piece_by_piece(tmp_path: Path):
    arguments = _with_virtio_mem(512 * _MIB, tmp_path, ",dynamic-memslots=on")
    with (
        stopped_machine(newer_qemu_command(), arguments) as machine,
        virtio_mem(tmp_path / "qtest", _SLOT, _MEMORY_AT, _BLOCK) as driver,
    ):
        driver.plug([3, 300, 301])
        native = OracleDumps(machine, tmp_path).elf
        for door in (("--qmp", machine.qmp_sockets[0]), ("--gdb", machine.gdb_socket)):
            done = run_cli(*door, "--exact", "--force", tmp_path / "ours")
            assert done.returncode == 0, done.stderr
            assert filecmp.cmp(native, tmp_path / "ours", shallow=False)
        assert Plugging(machine, driver).plugged_loads(native) == [(3, 1), (300, 2)]


_AT_2_GIB = 2 << 30
_ARM = ("aarch64", "qemu-system-arm")


@pytest.mark.parametrize("qemu", ["7.2", "newer"])
def test_what_is_plugged_on_another_board(tmp_path: Path, qemu: str):
    command = newer_qemu_command(*_ARM) if qemu == "newer" else [f"qemu-system-{_ARM[0]}"]
    device = f"virtio-mem-pci,id=vm0,memdev=v0,addr={_SLOT},block-size={_BLOCK}"
    arguments = [
        *("-M", "virt", "-cpu", "cortex-a57", "-m", "16M,maxmem=2G,slots=1"),
        *_backend("v0", "64M"),
        *("-device", f"{device},requested-size={_USABLE}"),
        *qtest_arguments(tmp_path / "qtest"),
    ]
    with (
        stopped_machine(command, arguments) as machine,
        virtio_mem(tmp_path / "qtest", _SLOT, _AT_2_GIB, _BLOCK, ARM_VIRT) as driver,
    ):
        driver.plug([1, 2, 9])
        native = OracleDumps(machine, tmp_path).elf
        for door in (("--qmp", machine.qmp_sockets[0]), ("--gdb", machine.gdb_socket)):
            done = run_cli(*door, "--exact", "--force", tmp_path / "ours")
            assert done.returncode == 0, done.stderr
            assert filecmp.cmp(native, tmp_path / "ours", shallow=False)
        loads = elf_facts(native)["loads"]
    assert [(paddr - _AT_2_GIB, size) for _, paddr, size, _ in loads if paddr >= _AT_2_GIB] == [
        (_BLOCK, 2 * _BLOCK),
        (9 * _BLOCK, _BLOCK),
    ]


@dataclass(frozen=True)
class Board:
    """A machine whose memory device needs a board of its own.

    Attributes:
        arguments: Of QEMU.
        newer: Target and package, where the machine's own QEMU has no such device.
    """

    arguments: tuple[str, ...]
    newer: tuple[str, str] | None = ("x86_64", "qemu-system-x86")


def _cxl(*device: str) -> tuple[str, ...]:
    window = "cxl-fmw.0.targets.0=cxl1,cxl-fmw.0.size=4G"
    return (
        *("-M", f"q35,cxl=on,{window}", "-m", "16M,maxmem=2G,slots=4"),
        *("-device", "pxb-cxl,bus_nr=12,bus=pcie.0,id=cxl1"),
        *("-device", "cxl-rp,port=0,bus=cxl1,id=rp,chassis=0,slot=2"),
        *device,
    )


_LABELLED = (*_backend("v", "256M"), *_backend("label", "256M"))
_BOARDS = {
    "cxl-type3, persistent, 7.2": Board(
        _cxl(*_LABELLED, "-device", "cxl-type3,bus=rp,memdev=v,lsa=label"), newer=None
    ),
    "cxl-type3, persistent": Board(
        _cxl(*_LABELLED, "-device", "cxl-type3,bus=rp,persistent-memdev=v,lsa=label")
    ),
    "cxl-type3, volatile": Board(
        _cxl(*_backend("v", "256M"), "-device", "cxl-type3,bus=rp,volatile-memdev=v")
    ),
    "virtio-mem-ccw, unplugged": Board(
        (
            *("-m", "16M,maxmem=1G", *_backend("v", "256M")),
            *("-device", "virtio-mem-ccw,memdev=v,requested-size=64M"),
        ),
        newer=("s390x", "qemu-system-s390x"),
    ),
}


@pytest.mark.parametrize("name", _BOARDS)
def test_boards_with_memory_that_is_not_dumped(tmp_path: Path, name: str):
    board = _BOARDS[name]
    command = _OWN_QEMU if board.newer is None else newer_qemu_command(*board.newer)
    with stopped_machine(command, board.arguments) as machine:
        done = run_cli("--qmp", machine.qmp_sockets[0], "--exact", tmp_path / "ours")
        assert done.returncode == 0, done.stderr
        native = OracleDumps(machine, tmp_path).elf
    assert filecmp.cmp(native, tmp_path / "ours", shallow=False)
    assert native.stat().st_size < 20 * _MIB
