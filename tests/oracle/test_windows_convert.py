"""Dumps of Windows guests made of other dumps, and other dumps made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.cli import main as tools_main
from qemu_dump_ext.cli.dump_command import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import EXIT_INCOMPLETE
from tests.support.folders import folder_for
from tests.support.oracle import OracleDumps
from tests.support.windows_guest import (
    CONTEXT_SIZES,
    VCPUS,
    WindowsImage,
    register_value,
    windows_machine,
)

pytestmark = pytest.mark.qemu

_MADE: Mapping[str, tuple[str, ...]] = {
    "elf": (),
    "kdump": ("-z", "-R"),
    "full": ("-w",),
    "bitmap": ("-w", "--omit-zero"),
}


@dataclass(frozen=True)
class Dumped:
    """An image, dumps of it by us and by QEMU, and an ELF core of a guest without a driver."""

    image: WindowsImage
    paths: Mapping[str, Path]


@pytest.fixture(scope="module", params=[8, 4], ids=["64", "32"])
def dumped(request: pytest.FixtureRequest) -> Dumped:
    folder = folder_for(request, "windows")
    image = WindowsImage(request.param)
    image.add_kernel()
    image.crash(0xE2, 1, 2, 3, 4)
    paths = {name: folder / name for name in (*_MADE, "driverless")}
    with windows_machine(["qemu-system-x86_64"], folder) as machine:
        machine.plant(image)
        qmp = ["--qmp", str(machine.qmp_sockets[0])]
        for name, words in _MADE.items():
            assert main([*qmp, *words, str(paths[name])]) == 0
        native = OracleDumps(machine, folder_for(request, "native"))
        paths |= {"QEMU's elf": native.elf, "QEMU's dmp": native.take("win-dmp")}
        machine.plant(image, b"")
        assert main([*qmp, str(paths["driverless"])]) == 0
    return Dumped(image, paths)


def _convert(*words: object) -> int:
    return tools_main(["convert", *map(str, words)])


@pytest.mark.parametrize("source", ["full", "bitmap"])
def test_a_dump_of_windows_is_the_same_again(dumped: Dumped, source: str, tmp_path: Path):
    again = tmp_path / "again"
    assert _convert("-w", dumped.paths[source], again) == 0
    assert again.read_bytes() == dumped.paths["full"].read_bytes()
    assert _convert("-w", "--omit-zero", dumped.paths[source], tmp_path / "less") == 0
    assert (tmp_path / "less").read_bytes() == dumped.paths["bitmap"].read_bytes()


def test_that_of_qemu_is_the_same_again(dumped: Dumped, tmp_path: Path):
    again = tmp_path / "again"
    assert _convert("-w", dumped.paths["QEMU's dmp"], again) == 0
    expected = bytearray(dumped.paths["QEMU's dmp"].read_bytes())
    if dumped.image.word_size == 4:
        expected[0xFA4:0xFA8] = bytes(4)  # the upper half of its size is what it was
    assert again.read_bytes() == expected


@pytest.mark.parametrize("source", ["elf", "kdump", "QEMU's elf"])
def test_other_dumps_have_all_but_some_registers(
    dumped: Dumped, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    image, made = dumped.image, tmp_path / "made"
    assert _convert("-w", dumped.paths[source], made) == EXIT_INCOMPLETE
    assert "has zero for" in capsys.readouterr().err
    ours, live = made.read_bytes(), dumped.paths["full"].read_bytes()
    assert len(ours) == len(live)
    at_contexts = {
        image.file_offset(image.gpa_of(image.base + image.context_at(vcpu) + byte))
        for vcpu in range(VCPUS)
        for byte in range(CONTEXT_SIZES[image.word_size])
    }
    differing = {
        offset for offset, (one, other) in enumerate(zip(ours, live, strict=True)) if one != other
    }
    assert differing
    assert differing <= at_contexts
    context = image.file_offset(image.gpa_of(image.base + image.context_at(0)))
    if image.word_size == 8:
        flags, rax = ours[context + 0x30 :][:4], ours[context + 0x78 :][:8]
        # Nothing is said of registers of which nothing is known.
        assert int.from_bytes(flags, "little") == 0x100017
        assert int.from_bytes(rax, "little") == register_value(0, 0, long=True)


def test_without_a_driver(dumped: Dumped, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert _convert("-w", dumped.paths["driverless"], tmp_path / "made") == EXIT_INCOMPLETE
    said = capsys.readouterr().err
    assert f"the header was made of the kernel at {dumped.image.kernel_base:#x}" in said
    with open_dump(tmp_path / "made") as dump:
        assert dump.header["BugcheckCode"] == 0xE2
        assert not verify_dump(dump).problems


@pytest.mark.parametrize("words", [(), ("-z", "-R")], ids=["elf", "kdump"])
def test_of_a_dump_of_windows_there_are_registers(
    dumped: Dumped, words: tuple[str, ...], tmp_path: Path
):
    made = tmp_path / "made"
    assert _convert(*words, dumped.paths["full"], made) == EXIT_INCOMPLETE
    with open_dump(made) as dump, open_dump(dumped.paths["full"]) as earlier:
        assert not verify_dump(dump).problems
        guest = StoredGuest(dump)
        long = dumped.image.word_size == 8
        assert len(guest.vcpus) == VCPUS
        for number, vcpu in enumerate(guest.vcpus):
            for index, name in enumerate("rax rbx rcx rdx rsi rdi".split()):
                assert vcpu.registers[name] == register_value(number, index, long=long), name
        for gpa, size in earlier.memory_ranges():
            assert dump.read(gpa, size) == earlier.read(gpa, size)
