"""Pages that a dump leaves out are asked for from no source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.guest.access import GuestAccess, Stub
from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from qemu_dump_ext.memory_sources.backing_file import BackingFileMemory
from qemu_dump_ext.memory_sources.gdbstub import StubMemory
from qemu_dump_ext.memory_sources.native_stream import DumpedPieces
from qemu_dump_ext.memory_sources.pmemsave import SavedPieces
from qemu_dump_ext.memory_sources.process import ProcessMemory
from qemu_dump_ext.plan.request import DumpRequest, MemoryRange
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.sinks import open_sink
from tests.support.raw_gdbstub import RawGdbstub
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.guest

MIB = 1 << 20
_BESIDES = 12 * MIB
"""Struct pages of 256 MiB are 4; page tables, and what lies around them; what proves a source."""
_READ: dict[str, tuple[type, str, Callable[..., int]]] = {
    "process": (ProcessMemory, "read_into", lambda _, buffer: len(buffer)),
    "backing_file": (BackingFileMemory, "read_into", lambda _, buffer: len(buffer)),
    "gdbstub": (StubMemory, "read_into", lambda _, buffer: len(buffer)),
    "native_stream": (DumpedPieces, "begin", lambda _file, _gpa, size: size),
    "pmemsave": (SavedPieces, "begin", lambda _file, _gpa, size: size),
}
"""By source: what asks QEMU for memory, and for how much."""


@pytest.fixture(scope="module")
def guest() -> Iterator[BootedGuest]:
    """A stopped guest whose memory is a file that is shared."""
    image = find_image("x86_64")
    size = f"{image.memory_mib}M"
    backend = f"memory-backend-memfd,id=shared,size={size},share=on"
    arguments = ["-object", backend, "-machine", "memory-backend=shared"]
    files = ImageStore(default_cache()).fetch(image)
    with BootedGuest(image, files, arguments=arguments) as booted:
        with RawQmp(booted.qmp_sockets[1]) as qmp:
            qmp.execute("stop")
        yield booted


class _Stub:
    # A debugger that does nothing but ask.
    def __init__(self, stub: RawGdbstub) -> None:
        self._stub = stub

    def addresses(self) -> list[str]:
        return []

    def packet(self, text: str) -> str:
        return self._stub.packet(text)

    def read(self, address: int, buffer: memoryview) -> None:
        for start in range(0, len(buffer), 2000):
            part = buffer[start : start + 2000]
            part[:] = bytes.fromhex(self._stub.packet(f"m{address + start:x},{len(part):x}"))

    def flush(self) -> None:
        pass

    def vcpus(self) -> Iterator[int]:
        return iter(())


def _dump(guest: BootedGuest, source: str, request: DumpRequest, path: Path) -> DumpReport:
    with connect_qmp(str(guest.qmp_sockets[0])) as qmp, RawGdbstub(guest.gdb_socket) as raw:
        stub: Stub | None = _Stub(raw) if source == "gdbstub" else None
        access = GuestAccess.by_qmp(qmp, stub)
        with open_sink(str(path), force=False, standard_output=None) as sink:
            return dump(request, access, sink, memory=source, progress=ProgressMeter(None))


@pytest.mark.parametrize("source", _READ)
def test_pages_that_are_left_out_are_not_read(
    guest: BootedGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
):
    kind, method, size_of = _READ[source]
    original = getattr(kind, method)
    asked = 0

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal asked
        asked += size_of(*arguments)
        return original(self, *arguments)

    monkeypatch.setattr(kind, method, counted)
    # By packets, a part is enough.
    bounds = MemoryRange(0, 4 * MIB, is_extension=True) if source == "gdbstub" else None
    request = DumpRequest(
        format="kdump-raw-zlib", dump_level=31, dump_level_required=True, memory_range=bounds
    )
    report = _dump(guest, source, request, tmp_path / "dump")
    assert report.memory_source.split("+")[0] == source  # a ROM may come from another
    assert 0 < asked <= report.memory_size + _BESIDES, (asked / MIB, report.memory_size / MIB)
