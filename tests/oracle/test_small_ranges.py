"""A small range of a large guest costs little: neither time nor memory of QEMU's host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from tests.support.ways import every_way, take_dumps

pytestmark = [pytest.mark.qemu, pytest.mark.gdb]

_A_FEW_PAGES = 64 << 10
"""Bytes; memory is compared at some places with what QEMU's monitor shows."""
_PAGE = 4096
_WAYS = tuple(way for way in every_way() if way.dump_format == "elf")


def _populated(machine: QemuMachine) -> int:
    found = [
        link.stat().st_blocks * 512
        for link in Path(f"/proc/{machine.pid}/fd").iterdir()
        if "memfd:memory-backend" in str(link.readlink())
    ]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def large() -> Iterator[QemuMachine]:
    """A guest of 8 GiB in a memfd, of which nothing is populated."""
    backend = "memory-backend-memfd,id=ram,size=8G,share=on"
    arguments = ["-M", "q35,memory-backend=ram", "-m", "8G", "-object", backend]
    with stopped_machine(["qemu-system-x86_64"], arguments) as machine:
        yield machine


def test_a_range_populates_nothing_but_itself(large: QemuMachine, tmp_path: Path):
    before = _populated(large)
    outcomes = take_dumps(large, tmp_path, _WAYS, "--range", "0x40100000", hex(_PAGE))
    for outcome in outcomes.values():
        assert outcome.status == 0, outcome.said
        assert "VMCOREINFO was not looked for in all of guest memory" in outcome.said
    assert _populated(large) - before <= _A_FEW_PAGES
