"""Windows guests without a driver: the header of the dump is made of the kernel in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.cli.dump_command import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import RequestError
from tests.support.folders import folder_for
from tests.support.windows_guest import (
    BLOCKS_AT,
    BUILD,
    DATA_SIZE,
    KDBG_AT,
    PAGE,
    RUNS,
    SHARED_USER_DATA,
    SYSTEM_TIME,
    UP_TIME,
    VCPUS,
    WindowsImage,
    WindowsMachine,
    header_field,
    windows_machine,
)

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_KEYS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xFFFFF80212345678)


@dataclass(frozen=True)
class Place:
    """A machine, and the width of the kernels that are planted in it."""

    machine: WindowsMachine
    word_size: int
    pae: bool

    def plant(self, keys: tuple[int, int, int] | None = None) -> WindowsImage:
        """Plant a kernel; there is no note."""
        image = WindowsImage(self.word_size, pae=self.pae)
        image.add_kernel(keys=keys)
        self.machine.plant(image, b"")
        return image

    def argv(self, *words: object) -> list[str]:
        """Return the arguments of a dump."""
        return ["--qmp", str(self.machine.qmp_sockets[0]), "-w", *map(str, words)]


_PLACES = {"64": (8, True), "PAE": (4, True), "32": (4, False)}


@pytest.fixture(scope="module", params=_PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with windows_machine(["qemu-system-x86_64"], folder_for(request, "windows")) as machine:
        yield Place(machine, *_PLACES[request.param])


def _check(image: WindowsImage, dump: Path) -> None:
    header, word = dump.read_bytes(), image.word_size
    mask = (1 << 8 * word) - 1
    expected = {
        "MinorVersion": BUILD,
        "DirectoryTableBase": image.root,
        "NumberProcessors": VCPUS,
        "KdDebuggerDataBlock": (image.base + KDBG_AT) & mask,
        "NumberOfRuns": len(RUNS),
        "NumberOfPages": sum(count for _, count in RUNS),
        "DumpType": 1,
        "RequiredDumpSpace": dump.stat().st_size,
        "SystemTime": SYSTEM_TIME,
        "SystemUpTime": UP_TIME,
        "ProductType": 3,
        "SuiteMask": 0x110,
        "BugcheckCode": 0x161,
    }
    assert {name: header_field(header, word, name) for name in expected} == expected
    with open_dump(dump) as opened:
        assert not verify_dump(opened).problems
        for vcpu in range(VCPUS):
            gpa = image.gpa_of(image.base + image.context_at(vcpu))
            flags = {8: (0x30, 0x10001F), 4: (0, 0x10017)}[word]
            assert opened.read(gpa + flags[0], 4) == flags[1].to_bytes(4, "little")


def test_a_header_is_made(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    image = place.plant()
    dump = tmp_path / "dump"
    assert main(place.argv(dump)) == 0
    _check(image, dump)
    said = capsys.readouterr().err
    assert "no vmcoreinfo note from the guest" in said
    assert f"the kernel at {image.kernel_base:#x} (build {BUILD})" in said
    assert "physical memory is what it lists" in said


def test_exact_is_refused_as_qemu_refuses(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place.plant()
    assert main(place.argv("--exact", tmp_path / "dump")) == RequestError.exit_status
    assert "invalid vmcoreinfo note size" in capsys.readouterr().err


def test_a_header_of_a_driver_that_lies_is_replaced(place: Place, tmp_path: Path):
    image = WindowsImage(place.word_size, pae=place.pae)
    image.add_kernel()
    image.set("KdDebuggerDataBlock", 0x7000_0000)
    place.machine.plant(image)
    assert main(place.argv(tmp_path / "dump")) == 0
    _check(image, tmp_path / "dump")


@pytest.mark.parametrize("rotation", [0, 1, 21, 63])
def test_an_encoded_block_is_decoded(place: Place, tmp_path: Path, rotation: int):
    if place.word_size == 4:
        return  # kernels of 32 bits keep it as it is
    plain = place.plant().read(KDBG_AT, 0x340)
    image = place.plant((_KEYS[0] & -256 | rotation, *_KEYS[1:]))
    assert image.read(KDBG_AT + 0x10, 4) != b"KDBG"
    dump = tmp_path / "dump"
    assert main(place.argv(dump)) == 0
    _check(image, dump)
    with open_dump(dump) as opened:
        found = b"".join(
            opened.read(image.gpa_of(image.base + KDBG_AT + at), 8) for at in range(0, 0x340, 8)
        )
    assert found[16:] == plain[16:]


def test_memory_that_the_kernel_does_not_list(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    image = WindowsImage(place.word_size, pae=place.pae)
    image.add_kernel()
    image.store_pointer(0x3300, 0)
    place.machine.plant(image, b"")
    assert main(place.argv(tmp_path / "dump")) == 0
    assert "physical memory is all RAM of the machine" in capsys.readouterr().err
    with open_dump(tmp_path / "dump") as opened:
        assert opened.read(0, 16) == bytes(image.pages[0][:16])
        assert any(gpa + size == 16 << 20 for gpa, size in opened.memory_ranges())


def test_processors_that_run_programs(place: Place, tmp_path: Path):
    if place.word_size == 4:
        return  # kernels of 32 bits are in the tables of programs
    image = WindowsImage()
    image.add_kernel()
    image.run_program()
    place.machine.plant(image, b"")
    assert main(place.argv(tmp_path / "dump")) == 0
    _check(image, tmp_path / "dump")


def _unmapped_header(image: WindowsImage) -> None:
    image.unmap(image.kernel_base)


def _far_handler(image: WindowsImage) -> None:
    image.put_handler(image.kernel_base - 0x100000)


def _no_shared_data(image: WindowsImage) -> None:
    image.unmap(SHARED_USER_DATA[image.word_size])


def _no_idt(image: WindowsImage) -> None:
    image.unmap(0)


def _another_base(image: WindowsImage) -> None:
    image.store_pointer(KDBG_AT + 0x18, image.kernel_base + 0x1000)


def _short_kdbg(image: WindowsImage) -> None:
    image.store(KDBG_AT + 0x14, (0x330).to_bytes(4, "little"))


def _pointers_elsewhere(image: WindowsImage) -> None:
    image.store_pointer(KDBG_AT + 0x218, image.base + DATA_SIZE)


def _no_version(image: WindowsImage) -> None:
    image.store(0x3800, bytes(40))


def _another_machine(image: WindowsImage) -> None:
    image.put(image.gpa_of(image.kernel_base + 0x104), b"\x64\xaa")


def _huge_image(image: WindowsImage) -> None:
    image.put(image.gpa_of(image.kernel_base + 0x118 + 56), b"\xff" * 4)


def _full_of_tags(image: WindowsImage) -> None:
    # Each page of a large image is one that has nothing but tags, and the base of the kernel.
    image.store(KDBG_AT + 0x10, bytes(4))
    tags = b"KDBG" + (0x340).to_bytes(4, "little") + b"\xee" * 8
    place = image.new_page(tags * (PAGE // 16))
    for gva in range(image.kernel_base + PAGE, image.base - PAGE, PAGE):
        image.map(gva, place, PAGE)


_REFUSED: Mapping[str, tuple[Callable[[WindowsImage], None], str]] = {
    "no header": (_unmapped_header, "no image of a kernel is around its handler"),
    "a handler elsewhere": (_far_handler, "no image of a kernel is around its handler"),
    "no shared data": (_no_shared_data, "where Windows has data for all programs"),
    "no IDT": (_no_idt, "its IDT is not mapped"),
    "KDBG of another kernel": (_another_base, "has no KDBG in memory"),
    "KDBG of Vista": (_short_kdbg, "has no KDBG in memory"),
    "KDBG that leads elsewhere": (_pointers_elsewhere, "has no KDBG in memory"),
    "no version": (_no_version, "does not tell its version"),
    "an image for another machine": (_another_machine, "no image of a kernel"),
    "an image of 4 GiB": (_huge_image, "no image of a kernel"),
    "nothing but tags": (_full_of_tags, "has no KDBG in memory"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_where_the_evidence_is_not_enough(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
):
    change, words = _REFUSED[case]
    image = WindowsImage(place.word_size, pae=place.pae)
    image.add_kernel()
    change(image)
    place.machine.plant(image, b"")
    assert main(place.argv(tmp_path / "dump")) == RequestError.exit_status
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_vcpu_that_the_kernel_does_not_use(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    image = WindowsImage(place.word_size, pae=place.pae)
    image.add_kernel()
    image.store_pointer(BLOCKS_AT + place.word_size, 0)
    place.machine.plant(image, b"")
    assert main(place.argv(tmp_path / "dump")) == 6
    assert "bigger than NumberProcessors (1)" in capsys.readouterr().err
    header = (tmp_path / "dump").read_bytes()
    assert header_field(header, place.word_size, "NumberProcessors") == 1
