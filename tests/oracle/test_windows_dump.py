"""Windows dumps: with --exact QEMU's own file, and where QEMU refuses, its words."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.cli.dump_command import main
from qemu_dump_ext.errors import EXIT_INCOMPLETE, RequestError
from tests.oracle import known_differences
from tests.support.folders import folder_for
from tests.support.newer_qemu import newer_qemu_command
from tests.support.raw_qmp import RawQmp
from tests.support.windows_cases import CASES
from tests.support.windows_guest import (
    HEADER_SIZES,
    VCPUS,
    WindowsImage,
    WindowsMachine,
    header_field,
    windows_machine,
)

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]


@dataclass(frozen=True)
class Place:
    """A machine, and the kind of Windows that is planted in it: each has its own, see `plant`."""

    machine: WindowsMachine
    word_size: int
    pae: bool

    def image(self) -> WindowsImage:
        """Return a sound one."""
        return WindowsImage(self.word_size, pae=self.pae)


_PLACES = {"64": (8, True), "PAE": (4, True), "newer-64": (8, True), "newer-32": (4, False)}


@pytest.fixture(scope="module", params=_PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    newer = request.param.startswith("newer")
    command = newer_qemu_command() if newer else ["qemu-system-x86_64"]
    with windows_machine(command, folder_for(request, "windows")) as machine:
        yield Place(machine, *_PLACES[request.param])


@dataclass(frozen=True)
class Taken:
    """A dump, or why there is none."""

    path: Path | None
    refusal: str = ""


def native(machine: WindowsMachine, path: Path) -> Taken:
    """Have QEMU take its own."""
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        try:
            qmp.execute(
                "dump-guest-memory", paging=False, protocol=f"file:{path}", format="win-dmp"
            )
        except RuntimeError as error:
            return Taken(None, str(error).removeprefix("dump-guest-memory: "))
    return Taken(path)


@pytest.mark.parametrize("case", CASES)
def test_exact(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str):
    machine, image = place.machine, place.image()
    machine.plant(image, CASES[case](image))
    # Before QEMU: where it gives up, what it has stored in the guest stays there.
    ours = tmp_path / "ours"
    status = main(["--qmp", str(machine.qmp_sockets[0]), "-w", "--exact", str(ours)])
    said = capsys.readouterr().err
    theirs = native(machine, tmp_path / "theirs")
    if theirs.path is None:
        assert status == RequestError.exit_status, said
        assert theirs.refusal in said
    else:
        assert status in {0, EXIT_INCOMPLETE}, said
        assert filecmp.cmp(ours, theirs.path, shallow=False)


def test_default_differs_where_it_is_said(place: Place, tmp_path: Path):
    machine, image = place.machine, place.image()
    image.set("NumberOfPages", 0x123456)
    machine.plant(image)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert main(["--qmp", str(machine.qmp_sockets[0]), "-w", str(ours)]) == 0
    assert native(machine, theirs).path
    places = dict.fromkeys(range(4004, 4008), "RequiredDumpSpace")
    part, name = {8: (range(0x100, 0x2A0), "x87 and SSE"), 4: (range(716, 720), "behind CONTEXT")}[
        place.word_size
    ]
    for vcpu in range(VCPUS):
        context = image.base + image.context_at(vcpu)
        places |= {image.file_offset(image.gpa_of(context + byte)): name for byte in part}
    pairs = enumerate(zip(ours.read_bytes(), theirs.read_bytes(), strict=True))
    found = {places.get(offset, hex(offset)) for offset, (one, other) in pairs if one != other}
    assert (
        found
        == {8: {"x87 and SSE"}, 4: known_differences.WINDOWS.keys() - {"x87 and SSE"}}[
            place.word_size
        ]
    )
    size = header_field(ours.read_bytes(), place.word_size, "RequiredDumpSpace")
    assert size == HEADER_SIZES[place.word_size] + 0x123456000


@pytest.mark.parametrize("case", ["runs that descend", "runs that overlap", "more runs than room"])
def test_runs_of_no_guest_are_refused(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
):
    image = place.image()
    place.machine.plant(image, CASES[case](image))
    words = ["--qmp", str(place.machine.qmp_sockets[0]), "-w", str(tmp_path / "dump")]
    assert main(words) == RequestError.exit_status
    assert "invalid header: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "runs",
    [[(1, 1 << 20)], [(0xFFFFF, 2)], [(0, 0xFFFFF)] * 2, [(0xFFFFFFFF, 0xFFFFFFFF)]],
    ids=["large", "behind the end", "again and again", "wide"],
)
def test_more_than_the_guest_has_is_never_written(
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    runs: list[tuple[int, int]],
    exact: bool,
):
    # QEMU writes zeros, as long as the disk has room.
    image = place.image()
    image.set_runs(runs)
    place.machine.plant(image)
    words = ["--qmp", str(place.machine.qmp_sockets[0]), "-w", str(tmp_path / "dump")]
    assert main([*words, "--exact"] if exact else words) == RequestError.exit_status
    said = capsys.readouterr().err
    assert "failed to map physical range" in said or "do not ascend" in said
    assert not list(tmp_path.iterdir())
