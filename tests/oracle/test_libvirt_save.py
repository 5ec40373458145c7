"""What libvirt saves of a paused domain holds what QEMU's own dump of the same domain does."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import DumpFile, open_dump
from qemu_dump_ext.dump_readers.libvirt_save import LibvirtSaveFile
from qemu_dump_ext.dump_readers.migration import MigrationFile
from qemu_dump_ext.dump_readers.packed_migration import PackedMigrationFile
from qemu_dump_ext.dump_readers.qcow2 import Qcow2File
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.guest_images.machine import stopped_machine
from tests.support.internal_snapshots import add_disk
from tests.support.libvirt_host import SESSION, SYSTEM, LibvirtHost, missing_for_libvirt
from tests.support.planted import plant_memory, plant_registers
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu
_PACKERS = ("gzip", "bzip2", "xz", "lzop", "zstd")
_SAVED_BY = "lzop" if shutil.which("lzop") else "gzip"
_PIECE = 1 << 20
_ROM_END = 1 << 20
"""Up to here, ROM lies over memory until the BIOS lets it be seen."""


@dataclass(frozen=True)
class Written:
    """Files of one paused domain.

    Attributes:
        native: QEMU's own dump of it, by libvirt.
        stream: What else libvirt wrote of it.
    """

    native: Path
    stream: Path


@contextmanager
def _libvirt(folder: Path, uri: str) -> Iterator[LibvirtHost]:
    if reason := missing_for_libvirt():
        pytest.skip(reason)
    host = LibvirtHost(folder, uri)
    if uri == SESSION:
        configuration = host.directory / "runtime/.config/libvirt/qemu.conf"
        configuration.parent.mkdir(parents=True)
        configuration.write_text(f'save_image_format = "{_SAVED_BY}"\ndump_image_format = "xz"\n')
        for path in (configuration, *configuration.parents[:2]):
            shutil.chown(path, *2 * [configuration.parents[2].stat().st_uid])
    with host.running():
        yield host
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LibvirtHost]:
    with _libvirt(tmp_path_factory.mktemp("saved"), SYSTEM) as found:
        yield found


@pytest.fixture(scope="module")
def packing_host() -> Iterator[LibvirtHost]:
    """A libvirtd that packs what it writes: a user's own, for that has its own configuration."""
    # Its sockets have long names.
    with _libvirt(Path(tempfile.mkdtemp(prefix="lv-")), SESSION) as found:
        yield found


def _write(host: LibvirtHost, command: str, *, to: str = "", devices: str = "") -> Written:
    """Have libvirt write both of a domain, which it cannot save again once it has done so.

    Args:
        host: Where it runs.
        command: Of virsh.
        to: What that gets; empty: a file of the command's name.
        devices: Of the domain.
    """
    stub = host.directory / f"{command}.gdb"
    options = ("-gdb", f"unix:{stub},server=on,wait=off")
    domain = host.create(f"to-{command}", memory=32, vcpus=2, arguments=options, devices=devices)
    plant_registers("x86_64", stub)
    with RawQmp(domain.qmp) as qmp:
        plant_memory(command, qmp, stub)
    written = Written(host.directory / f"{command}.elf", host.directory / command)
    host.virsh("dump", domain.name, written.native, "--memory-only")
    host.virsh(command, domain.name, to or written.stream)
    return written


@pytest.fixture(scope="module")
def saved(host: LibvirtHost) -> Written:
    return _write(host, "save")


@pytest.fixture(scope="module")
def dumped(host: LibvirtHost) -> Written:
    return _write(host, "dump")


def _compare(path: Path, native: Path) -> None:
    """Check that pages and registers are the same, and all of them."""
    with open_dump(path) as theirs, open_dump(native) as dump:
        assert isinstance(theirs, MigrationFile)
        assert [(note.name, note.type) for note in theirs.notes] == [
            (note.name, note.type) for note in dump.notes
        ]
        assert [note.descriptor for note in theirs.notes] == [
            note.descriptor for note in dump.notes
        ]
        assert _compare_memory(theirs, dump) >= 31 << 20
        assert not verify_dump(theirs).problems


def _compare_memory(theirs: DumpFile, ours: DumpFile) -> int:
    compared = 0
    known = list(ours.memory_ranges())
    for gpa, size in theirs.memory_ranges():
        for start, count in known:
            low, high = max(gpa, start, _ROM_END), min(gpa + size, start + count)
            for at in range(low, high, _PIECE):
                piece = min(_PIECE, high - at)
                assert theirs.read(at, piece) == ours.read(at, piece), hex(at)
                compared += piece
    return compared


def test_a_save_image_is_the_domain(saved: Written):
    with open_dump(saved.stream) as dump:
        assert isinstance(dump, LibvirtSaveFile)
        assert dump.save_header.finished
        assert dump.save_header.packing is None
        assert not dump.save_header.was_running
        assert dump.domain is not None
        assert dump.domain[0] == "to-save"
    _compare(saved.stream, saved.native)


def test_a_dump_that_is_not_of_memory_only_is_the_domain(dumped: Written):
    _compare(dumped.stream, dumped.native)


def test_a_snapshot_that_libvirt_has_made_is_the_domain(host: LibvirtHost):
    disk = host.directory / "disk.qcow2"
    with (
        stopped_machine(["qemu-system-x86_64"]) as machine,
        RawQmp(machine.qmp_sockets[0]) as qmp,
    ):
        add_disk(qmp, disk)
    source = f"<driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda'/>"
    written = _write(
        host, "snapshot-create-as", to="before", devices=f"<disk type='file'>{source}</disk>"
    )
    with open_dump(disk) as dump:
        assert isinstance(dump, Qcow2File)
        assert dump.snapshot.name == "before"
    _compare(disk, written.native)


def test_an_image_that_libvirt_has_packed_is_the_domain(packing_host: LibvirtHost):
    written = _write(packing_host, "save")
    with open_dump(written.stream) as dump:
        assert isinstance(dump, LibvirtSaveFile)
        assert dump.save_header.packing == _SAVED_BY
    _compare(written.stream, written.native)


def test_a_dump_that_libvirt_has_packed_is_the_domain(packing_host: LibvirtHost):
    written = _write(packing_host, "dump")
    with open_dump(written.stream) as dump:
        assert isinstance(dump, PackedMigrationFile)
        assert dump.packing == "xz"
    _compare(written.stream, written.native)


@pytest.mark.parametrize("packer", _PACKERS)
def test_what_the_programs_of_libvirt_pack_is_unpacked(
    packer: str, dumped: Written, tmp_path: Path
):
    if shutil.which(packer) is None:
        pytest.skip(f"{packer} is not installed")
    packed = tmp_path / "packed"
    with dumped.stream.open("rb") as stream, packed.open("wb") as target:
        subprocess.run([packer, "-1", "-c"], stdin=stream, stdout=target, check=True)
    _compare(packed, dumped.native)
