"""Volatility 3 finds in what is read, and in what is written, the pages that we do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from volatility3.framework.layers import avml, elf, lime, qemu

from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_readers import DumpFile, open_dump
from qemu_dump_ext.guest_images.machine import stopped_machine
from tests.oracle.test_migration_stream import migrate_to_file
from tests.support.folders import folder_for
from tests.support.planted import plant_memory, plant_registers
from tests.support.raw_qmp import RawQmp
from tests.support.sample_ranges import make_avml, make_lime
from tests.support.volatility import volatility_layer

pytestmark = pytest.mark.qemu

_RAM_SIZE = 64 << 20
_PIECE = 1 << 20
_PAGE = 4096


@pytest.fixture(scope="module")
def stream(request: pytest.FixtureRequest) -> Iterator[Path]:
    """QEMU's stream of a machine that stands still.

    Machines of 10.0 and newer announce their last pages by what Volatility does not know.
    """
    folder = folder_for(request, "volatility")
    path = folder / "stream"
    with (
        stopped_machine(["qemu-system-x86_64"], ("-M", "pc-q35-7.2", "-smp", "2")) as machine,
        RawQmp(machine.qmp_sockets[0]) as qmp,
    ):
        plant_registers("x86_64", machine.gdb_socket)
        plant_memory("volatility", qmp, machine.gdb_socket)
        migrate_to_file(qmp, path)
    yield path
    path.unlink()


def _same_pages(dump: DumpFile, layer: Any, end: int = 1 << 64) -> int:
    """Compare memory up to an address, and return how many bytes of it are no zeros."""
    compared = 0
    for gpa, size in dump.memory_ranges():
        for at in range(gpa, min(gpa + size, end), _PIECE):
            count = min(_PIECE, gpa + size - at)
            content = dump.read(at, count)
            assert layer.read(at, count, pad=True) == content, hex(at)
            compared += len(content) - content.count(0)
    return compared


def test_stream_has_the_pages_that_volatility_finds(stream: Path):
    with open_dump(stream) as dump, volatility_layer(stream, qemu.QemuSuspendLayer) as layer:
        # Volatility takes the main memory alone, and not the BIOS.
        assert _same_pages(dump, layer, _RAM_SIZE) > 2500


def test_volatility_reads_the_elf_core_of_a_stream(stream: Path, tmp_path: Path):
    target = tmp_path / "vm.elf"
    assert main(["convert", str(stream), str(target)]) == 6  # where RAM lies is not proved
    with open_dump(stream) as dump, volatility_layer(target, elf.Elf64Layer) as layer:
        assert _same_pages(dump, layer) > 2500


@pytest.mark.parametrize(
    ("make", "layer_class"), [(make_lime, lime.LimeLayer), (make_avml, avml.AVMLLayer)]
)
def test_volatility_finds_the_same_in_files_of_others(make: Any, layer_class: Any, tmp_path: Path):
    path = tmp_path / "ranges"
    blocks = {0x1000: b"a" * 2 * _PAGE, 0x100000: bytes(range(256)) * 64}
    path.write_bytes(make(blocks))
    with open_dump(path) as dump, volatility_layer(path, layer_class) as layer:
        assert _same_pages(dump, layer) > 3 * _PAGE
