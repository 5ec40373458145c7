"""A file that QEMU wrote by the capability mapped-ram holds what QEMU's own dump does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers.migration import MigrationFile
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.guest_images.machine import stopped_machine
from tests.support.newer_qemu import newer_qemu_command
from tests.support.planted import plant_memory, plant_registers
from tests.support.raw_qmp import RawQmp
from tests.support.sample_save_image import XML, make_save_image
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu
_PIECE = 1 << 20
_ROM_END = 1 << 20
"""Up to here, ROM lies over memory until the BIOS lets it be seen."""


def _migrate(qmp: RawQmp, path: Path, offset: int, *names: str) -> None:
    capabilities = [{"capability": name, "state": True} for name in names]
    qmp.execute("migrate-set-capabilities", capabilities=capabilities)
    qmp.execute("migrate", uri=f"file:{path},offset={offset}")
    wait_until(lambda: qmp.execute("query-migrate").get("status") in {"completed", "failed"})
    assert qmp.execute("query-migrate")["status"] == "completed"


@dataclass(frozen=True)
class Way:
    """How a file comes about.

    Attributes:
        name: Of the test.
        capabilities: Of the migration, besides mapped-ram.
        head: What stands before the stream; libvirt has QEMU leave room for it.
    """

    name: str
    capabilities: tuple[str, ...] = ()
    head: bytes = b""


_WAYS = (
    Way("one channel"),
    Way("multifd", ("multifd",)),
    Way("libvirt's sparse", ("multifd",), make_save_image(b"", "sparse", xml=XML.ljust(5000))),
)


@pytest.fixture(scope="module", params=_WAYS, ids=lambda way: way.name)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """QEMU's dump of a machine of two vCPUs, and the file that it migrated to."""
    folder = tmp_path_factory.mktemp("mapped")
    native, mapped = folder / "native", folder / "mapped"
    with (
        stopped_machine(newer_qemu_command(), ("-M", "q35", "-smp", "2")) as machine,
        RawQmp(machine.qmp_sockets[0]) as qmp,
    ):
        plant_registers("x86_64", machine.gdb_socket)
        plant_memory("mapped", qmp, machine.gdb_socket)
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{native}")
        head = request.param.head
        _migrate(qmp, mapped, len(head), "mapped-ram", *request.param.capabilities)
    with mapped.open("r+b") as file:
        file.write(head)
    yield native, mapped
    shutil.rmtree(folder)


def test_pages_and_registers_are_those_of_the_dump(pair: tuple[Path, Path]):
    with open_dump(pair[0]) as native, open_dump(pair[1]) as mapped:
        assert isinstance(mapped, MigrationFile)
        assert mapped.format in {"migration", "libvirt_save"}
        assert "mapped-ram" in mapped.stream.capabilities
        assert [(note.name, note.type, note.descriptor) for note in mapped.notes] == [
            (note.name, note.type, note.descriptor) for note in native.notes
        ]
        compared = 0
        known = list(native.memory_ranges())
        for gpa, size in mapped.memory_ranges():
            for start, count in known:
                low, high = max(gpa, start, _ROM_END), min(gpa + size, start + count)
                for at in range(low, high, _PIECE):
                    piece = min(_PIECE, high - at)
                    assert mapped.read(at, piece) == native.read(at, piece), hex(at)
                    compared += piece
        assert compared >= 62 << 20
        report = verify_dump(mapped)
        assert not report.problems
        assert report.raw_pages
