"""What QEMU has put into a qcow2 image by `savevm` holds what QEMU's own dump does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers.qcow2 import Qcow2File
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import CorruptDumpError, RequestError
from qemu_dump_ext.guest_images.machine import stopped_machine
from tests.support.internal_snapshots import add_disk, delete_state, save_state
from tests.support.newer_qemu import newer_qemu_command
from tests.support.planted import plant_memory, plant_registers
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu

_PIECE = 1 << 20
_ROM_END = 1 << 20
"""Up to here, ROM lies over memory until the BIOS lets it be seen."""
_DISKS: dict[str, dict[str, Any]] = {
    "small": {"cluster-size": 512, "size": (1 << 30) - 512},
    "old": {"version": "v2", "size": 1 << 20},
    "large": {"cluster-size": 2 << 20, "size": 1 << 30},
}


@dataclass(frozen=True)
class Saved:
    """A machine that stands still.

    Attributes:
        qmp: To it.
        folder: Has its disks, by name, and QEMU's dump of it.
    """

    qmp: RawQmp
    folder: Path


@pytest.fixture(scope="module", params=["own", "newer"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Saved]:
    folder = tmp_path_factory.mktemp("savevm")
    command = newer_qemu_command() if request.param == "newer" else ["qemu-system-x86_64"]
    with (
        stopped_machine(command, ("-M", "q35", "-smp", "2")) as machine,
        RawQmp(machine.qmp_sockets[0]) as qmp,
    ):
        plant_registers("x86_64", machine.gdb_socket)
        plant_memory("savevm", qmp, machine.gdb_socket)
        saved = Saved(qmp, folder)
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{folder / 'native'}")
        for name, options in _DISKS.items():
            add_disk(qmp, folder / name, **options)
            save_state(qmp, name, "first")
        yield saved
    shutil.rmtree(folder)


@pytest.mark.parametrize("disk", _DISKS)
def test_pages_and_registers_are_those_of_the_dump(saved: Saved, disk: str):
    # The image is in use: QEMU has it open.
    with open_dump(saved.folder / "native") as native, open_dump(saved.folder / disk) as state:
        assert isinstance(state, Qcow2File)
        assert [(note.name, note.type, note.descriptor) for note in state.notes] == [
            (note.name, note.type, note.descriptor) for note in native.notes
        ]
        for at in range(_ROM_END, 64 << 20, _PIECE):
            assert state.read(at, _PIECE) == native.read(at, _PIECE), hex(at)
        report = verify_dump(state)
        assert not report.problems
        assert report.raw_pages


def test_snapshot_is_read_as_long_as_it_is_there(saved: Saved):
    image = saved.folder / "old"
    save_state(saved.qmp, "old", "second")
    with pytest.raises(RequestError, match=r"'first' \(ID 1\), 'second' \(ID 2\): which one"):
        open_dump(image)
    with open_dump(image, snapshot_name="second") as state:
        expected = state.read(_ROM_END, 16 * _PIECE)
        delete_state(saved.qmp, "old", "first")
        assert state.read(_ROM_END, 16 * _PIECE) == expected
        save_state(saved.qmp, "old", "first")
        delete_state(saved.qmp, "old", "second")
        with pytest.raises(CorruptDumpError, match="'second' was deleted while it was read"):
            state.read(_ROM_END, 16 * _PIECE)
    with open_dump(image) as state:
        assert state.read(_ROM_END, 16 * _PIECE) == expected


def test_command_line_converts_the_snapshot_that_is_named(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_state(saved.qmp, "large", "second")
    image, out = str(saved.folder / "large"), str(tmp_path / "out")
    assert main(["convert", image, out]) == 2
    assert "--snapshot-name NAME" in capsys.readouterr().err
    # Nothing proves where the RAM of a guest lies that has not run.
    assert main(["convert", image, out, "--snapshot-name", "second"]) == 6
    with open_dump(out) as ours, open_dump(saved.folder / "native") as native:
        assert ours.read(_ROM_END, _PIECE) == native.read(_ROM_END, _PIECE)
    capsys.readouterr()
    assert main(["inspect", "--json", image, "--snapshot-name", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["snapshot"] == "first"
