from __future__ import annotations

from pathlib import Path

import pytest

import qemu_dump_ext as qd
from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers.qcow2 import Qcow2File
from qemu_dump_ext.engine.inspect import describe
from qemu_dump_ext.errors import (
    CorruptDumpError,
    DumpError,
    NotADumpError,
    RequestError,
    UnsupportedTargetError,
)
from tests.support.sample_migration import PAGE, make_migration
from tests.support.sample_qcow2 import CLUSTER, make_qcow2

_RAM = b"".join(bytes((number,)) * PAGE for number in range(12))
_STREAM = make_migration(_RAM)
_OTHER = make_migration(_RAM[::-1])
_BASE = 0x80000000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


@pytest.mark.parametrize("version", [2, 3])
def test_state_in_a_snapshot_is_read_as_the_stream_is(path: Path, version: int):
    path.write_bytes(make_qcow2({"of the disk": b"", "one": _STREAM}, version=version))
    with open_dump(path) as dump:
        assert isinstance(dump, Qcow2File)
        assert dump.reader == "qcow2"
        assert dump.read(_BASE, len(_RAM)) == _RAM
        assert dump.vcpus[0].registers["x2"] == 2
        facts = describe("disk", dump)
    assert facts["snapshot"] == "one"
    assert facts["snapshots"] == [
        "of the disk (ID 1), of the disk alone",
        f"one (ID 2), {len(_STREAM)} bytes of state",
    ]


def test_disk_of_a_snapshot_of_the_first_qemus_is_as_large_as_that_of_the_image(path: Path):
    path.write_bytes(make_qcow2({"old": _STREAM}, version=2, extra=False))
    with open_dump(path) as dump:
        assert dump.read(_BASE, len(_RAM)) == _RAM


@pytest.mark.parametrize("name", ["two", "2"])
def test_snapshot_is_had_by_name_and_by_id(path: Path, name: str):
    path.write_bytes(make_qcow2({"one": _STREAM, "two": _OTHER}))
    with open_dump(path, snapshot_name=name) as dump:
        assert dump.reader == "qcow2"
        assert dump.read(_BASE, len(_RAM)) == _RAM[::-1]


def test_programs_say_which_snapshot(path: Path):
    path.write_bytes(make_qcow2({"one": _STREAM, "two": _OTHER}))
    with qd.open_dump(path, snapshot_name="two") as dump:
        assert dump.read(_BASE, PAGE) == _RAM[::-1][:PAGE]


def test_name_comes_before_id(path: Path):
    path.write_bytes(make_qcow2({"2": _STREAM, "1": _OTHER}))
    with open_dump(path, snapshot_name="2") as dump:
        assert dump.read(_BASE, len(_RAM)) == _RAM


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, "'one' (ID 1), 'two' (ID 3): which one?"),
        ("three", "'one' (ID 1), 'two' (ID 3): no such one"),
        ("disk", "'disk' is of the disk alone"),
    ],
)
def test_which_snapshots_there_are_is_told(path: Path, name: str | None, words: str):
    path.write_bytes(make_qcow2({"one": _STREAM, "disk": b"", "two": _OTHER}))
    with pytest.raises(RequestError) as caught:
        open_dump(path, snapshot_name=name)
    assert words in str(caught.value)


def test_snapshot_of_what_is_no_image_is_refused(path: Path):
    path.write_bytes(_STREAM)
    with pytest.raises(RequestError, match="is for qcow2 images"):
        open_dump(path, snapshot_name="one")


@pytest.mark.parametrize("states", [{}, {"disk": b""}])
def test_image_without_a_state_is_none(path: Path, states: dict[str, bytes]):
    path.write_bytes(make_qcow2(states))
    with pytest.raises(NotADumpError, match="no state of a guest"):
        open_dump(path)


@pytest.mark.parametrize(
    ("told", "error", "words"),
    [
        ({"crypt": 2}, UnsupportedTargetError, "encrypted"),
        ({"features": 4}, UnsupportedTargetError, "data_file"),
        ({"features": 16}, UnsupportedTargetError, "extended_l2"),
        ({"features": 32}, UnsupportedTargetError, "not known: 0x20"),
        ({"version": 1}, CorruptDumpError, "version 1"),
        ({"state_size": 1 << 20}, CorruptDumpError, "has less"),
        ({"entries": {0: 1 << 62 | CLUSTER}}, CorruptDumpError, "compressed"),
        ({"entries": {0: 0}}, CorruptDumpError, "at 0x0 of the state .* is not in the image"),
        ({"entries": {0: 1 << 40}}, CorruptDumpError, "beyond the dump's end"),
        ({"entries": {0: 1}}, CorruptDumpError, "does not begin like a migration stream"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(
    path: Path, told: dict[str, int], error: type[DumpError], words: str
):
    path.write_bytes(make_qcow2({"one": _STREAM}, **told))  # type: ignore[arg-type]
    with pytest.raises(error, match=words):
        open_dump(path)


def test_cluster_of_zeros_reads_as_zeros(path: Path):
    # All of the second page of RAM, and of the eight bytes before the third.
    stream = make_migration(_RAM)
    start = stream.index(b"\1" * PAGE)
    first = -(-start // CLUSTER)
    path.write_bytes(make_qcow2({"one": stream}, entries={first: 1}))
    with open_dump(path) as dump:
        page = dump.read(_BASE + PAGE, PAGE)
    low = first * CLUSTER - start
    assert page == b"\1" * low + bytes(CLUSTER) + b"\1" * (PAGE - CLUSTER - low)


def test_snapshot_whose_table_moves_is_read_on_and_one_that_is_gone_is_not(path: Path):
    image = make_qcow2({"one": _STREAM, "two": _OTHER})
    path.write_bytes(image)
    with open_dump(path, snapshot_name="two") as dump:
        # As QEMU deletes a snapshot: a table elsewhere, and then the header that leads there.
        place = int.from_bytes(image[64:72], "big")
        second = place + -(-(40 + 16 + 4) // 8) * 8
        with path.open("r+b") as file:
            file.seek(len(image))
            file.write(image[second:])
            file.seek(60)
            file.write((1).to_bytes(4, "big") + len(image).to_bytes(8, "big"))
        assert dump.read(_BASE, len(_RAM)) == _RAM[::-1]
        with path.open("r+b") as file:
            file.seek(60)
            file.write(bytes(12))
        with pytest.raises(CorruptDumpError, match="'two' was deleted while it was read"):
            dump.read(_BASE, len(_RAM))


def test_snapshot_in_whose_place_another_one_stands_is_gone(path: Path):
    image = make_qcow2({"one": _STREAM})
    path.write_bytes(image)
    with open_dump(path) as dump:
        with path.open("r+b") as file:
            file.seek(int.from_bytes(image[64:72], "big") + 16)
            file.write((1).to_bytes(4, "big"))  # another date
        with pytest.raises(CorruptDumpError, match="'one' was deleted"):
            dump.read(_BASE + PAGE, PAGE)


def test_estimate_is_of_the_snapshot_that_is_named(path: Path, capsys: pytest.CaptureFixture[str]):
    path.write_bytes(make_qcow2({"one": _STREAM, "two": _OTHER}))
    assert main(["estimate", str(path), "--format", "elf"]) == 2
    assert "--snapshot-name NAME" in capsys.readouterr().err
    # The one that is named has no Linux, of whose pages it could tell.
    assert main(["estimate", str(path), "--format", "elf", "--snapshot-name", "two"]) == 3
    assert "VMCOREINFO" in capsys.readouterr().err
