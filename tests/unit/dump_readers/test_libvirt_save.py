"""libvirt's save images and packed streams, made by hand, good ones and hostile ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from qemu_dump_ext.dump_readers import open_dump, reader_of
from qemu_dump_ext.dump_readers._image import PlainImage
from qemu_dump_ext.dump_readers._unpacked_image import unpacked_pieces
from qemu_dump_ext.dump_readers.libvirt_save import LibvirtSaveFile
from qemu_dump_ext.dump_readers.migration import MigrationFile
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import CorruptDumpError, DumpError, NoRoomLeftError
from qemu_dump_ext.structures.libvirt_save import domain_of
from tests.support.leftovers import nothing_left
from tests.support.sample_migration import PAGE, make_migration
from tests.support.sample_save_image import (
    PACKINGS,
    UNFINISHED,
    XML,
    make_save_image,
    pack,
    save_header,
)

_BASE = 0x80000000
_CONTENT = b"\1" * PAGE + bytes(PAGE) + b"\2" * PAGE
_STREAM = make_migration(_CONTENT)
EVERY_PACKING = pytest.mark.parametrize("packing", PACKINGS)


def opened(path: Path, data: bytes) -> MigrationFile:
    path.write_bytes(data)
    dump = open_dump(path)
    assert isinstance(dump, MigrationFile)
    return dump


def refusal(path: Path, data: bytes) -> str:
    """Return why a file is refused."""
    path.write_bytes(data)
    with nothing_left(), pytest.raises(DumpError) as caught:
        open_dump(path)
    return str(caught.value)


def damage_of(path: Path) -> Sequence[str]:
    """Return what is said to be wrong with a file."""
    try:
        with open_dump(path) as dump:
            return verify_dump(dump).problems
    except DumpError as error:
        return [str(error)]


@pytest.mark.parametrize("packing", ["", *PACKINGS])
def test_a_save_image_is_the_stream_in_it(packing: str, tmp_path: Path):
    with nothing_left(), opened(tmp_path / "s", make_save_image(_STREAM, packing)) as dump:
        assert isinstance(dump, LibvirtSaveFile)
        assert (dump.format, dump.reader) == ("libvirt_save", "libvirt_save")
        assert dump.architecture.name == "riscv64"
        assert dump.vcpus[0].registers["x7"] == 7
        assert dump.read(_BASE, 3 * PAGE) == _CONTENT
        described = {name: tell() for name, tell in reader_of(dump).describe(dump).items()}
        assert described["domain"] == "web1 1-2"
        assert described["packing"] == (packing or None)
        assert described["was_running"]
        assert not verify_dump(dump).problems


@EVERY_PACKING
def test_a_stream_that_is_packed_as_a_whole_is_the_stream(packing: str, tmp_path: Path):
    with nothing_left(), opened(tmp_path / "s", pack(_STREAM, packing)) as dump:
        assert dump.format == "packed_migration"
        assert dump.read(_BASE, 3 * PAGE) == _CONTENT
        assert reader_of(dump).describe(dump)["packing"]() == packing
        assert not verify_dump(dump).problems


def test_the_header_is_in_the_byte_order_of_its_host(tmp_path: Path):
    header = save_header(byte_order="big")
    with opened(tmp_path / "s", header + XML + b"\0" + _STREAM) as dump:
        assert dump.read(_BASE, 3 * PAGE) == _CONTENT


def test_an_unfinished_image_says_so(tmp_path: Path):
    data = save_header(magic=UNFINISHED) + XML + b"\0" + _STREAM
    with opened(tmp_path / "s", data) as dump:
        assert "libvirt has not finished this save image" in dump.lacking
        assert dump.read(_BASE, 3 * PAGE) == _CONTENT


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (save_header(version=3), "version 3, not 1 to 2"),
        (save_header(xml_size=0), "XML of 0x0 bytes"),
        (save_header(xml_size=1 << 31), "XML of 0x80000000 bytes"),
        (save_header(xml_size=1 << 23), "beyond the dump's end"),
        (save_header(99), "packed by program 99"),
        (save_header(4), "ends at offset 0x0"),
        (save_header()[:50], "beyond the dump's end"),
        (save_header(1), "ends at offset 0x0"),
    ],
)
def test_a_header_that_is_not_libvirts_is_told(header: bytes, reason: str, tmp_path: Path):
    assert reason in refusal(tmp_path / "s", header + XML + b"\0" + _STREAM * (len(header) > 50))


@EVERY_PACKING
@pytest.mark.parametrize("size", [0, 1, 40, -1])
def test_what_is_packed_and_cut_is_told(packing: str, size: int, tmp_path: Path):
    whole = make_save_image(_STREAM, packing)
    start = len(make_save_image(b""))
    path = tmp_path / "s"
    path.write_bytes(whole[: start + size] if size >= 0 else whole[:size])
    with nothing_left():
        assert damage_of(path)


@EVERY_PACKING
def test_what_is_packed_and_damaged_is_told(packing: str, tmp_path: Path):
    data = bytearray(make_save_image(os.urandom(1 << 16), packing))
    data[len(data) // 2] ^= 0xFF
    assert refusal(tmp_path / "s", bytes(data))


@EVERY_PACKING
def test_other_things_that_are_packed_are_no_dumps(packing: str, tmp_path: Path):
    data = pack(bytes(PAGE), packing)
    assert f"what {packing} has packed is no migration stream" in refusal(tmp_path / "s", data)


def test_packers_that_are_not_read_are_refused_by_name(tmp_path: Path):
    data = b"\x04\x22\x4d\x18" + bytes(100)
    assert "packed by lz4: unpack it first" in refusal(tmp_path / "s", data)


@pytest.mark.parametrize("words", [(), ("-9", "--crc32"), ("-F",)], ids=" ".join)
def test_what_lzop_itself_has_packed_is_read(words: tuple[str, ...], tmp_path: Path):
    if not shutil.which("lzop"):
        pytest.skip("lzop is not installed")
    content = _STREAM + os.urandom(300_000) + bytes(300_000)
    packed = subprocess.run(["lzop", "-c", *words], input=content, capture_output=True, check=True)
    path = tmp_path / "packed"
    path.write_bytes(packed.stdout)
    file = PlainImage(path)
    try:
        assert b"".join(unpacked_pieces(file, 0, "lzop")) == content
    finally:
        file.close()


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (15, 9, "with method 9"),
        (19, 0x08, "which are not read"),
        (22, 1, "the header that lzop wrote is damaged"),
        (38, 0x10, "bytes, 0x"),
        (60, None, "damaged"),
    ],
)
def test_what_lzop_does_not_write_is_refused(
    at: int, value: int | None, reason: str, tmp_path: Path
):
    data = bytearray(pack(_STREAM, "lzop"))
    data[at] = data[at] ^ 0xFF if value is None else value
    assert reason in refusal(tmp_path / "s", bytes(data))


def test_a_little_that_becomes_much_ends_where_the_room_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    left = iter((4 << 20, 3 << 20, 1 << 20))

    def room(_: int) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=next(left), f_blocks=20 << 20, f_frsize=1)

    monkeypatch.setattr(os, "fstatvfs", room)
    bomb = _STREAM + bytes(64 << 20)
    path = tmp_path / "s"
    path.write_bytes(pack(bomb, "gzip"))
    with nothing_left(), pytest.raises(NoRoomLeftError, match="TMPDIR"):
        open_dump(path)


def test_a_directory_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    said = refusal(tmp_path / "s", pack(_STREAM, "gzip"))
    assert said == f"cannot create a file in {tmp_path}/none: No such file or directory"


@pytest.mark.parametrize(
    ("xml", "domain"),
    [
        (XML + b"\0<cookie/>", ("web1", "1-2")),
        (b"<migration><domain><name>a</name></domain></migration>", ("a", "")),
        (b"<domain><name>a\nb</name></domain>", ("a b", "")),
        (b"<domain", None),
        (b"<other/>", None),
        (b"\xff\xfe", None),
        (b"<?xml version='1.0' encoding='none'?><domain/>", None),
        (b"<!DOCTYPE d [<!ENTITY a 'aa'>]><domain><name>&a;</name></domain>", None),
    ],
)
def test_the_xml_tells_which_domain_it_was(xml: bytes, domain: tuple[str, str] | None):
    assert domain_of(xml) == domain


def test_damaged_xml_does_not_hide_the_stream(tmp_path: Path):
    with opened(tmp_path / "s", make_save_image(_STREAM, xml=b"<dom")) as dump:
        assert dump.lacking[0] == "the XML of the domain is damaged"
        assert dump.read(_BASE, 3 * PAGE) == _CONTENT


def test_a_stream_that_is_cut_in_the_image_is_an_error(tmp_path: Path):
    with pytest.raises(CorruptDumpError):
        opened(tmp_path / "s", make_save_image(_STREAM[:40]))
