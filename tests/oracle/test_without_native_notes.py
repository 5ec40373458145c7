"""`--exact` where QEMU's own notes cannot be had: what was guessed is named, all else is exact."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.errors import EXIT_INCOMPLETE
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import QemuMachine, stopped_machine
from qemu_dump_ext.memory_sources import AUTO
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.sinks import open_sink
from tests.support.oracle import OracleDumps, elf_facts
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

_REFUSAL = "Could not open '/somewhere': Permission denied"
# The attributes of CS to GS and SS, LDT, TR: offsets in QEMUCPUState, by the order there.
_SEGMENTS = "cs ds es fs gs ss ldt tr".split()
_FLAGS = {160 + 24 * place: f"{name}_flags" for place, name in enumerate(_SEGMENTS)}


class _WithoutDumps:
    """The monitor of a QEMU that cannot write files of ours."""

    def __init__(self, execute: Callable[[str], str]) -> None:
        self._execute = execute

    def execute(self, command: str) -> str:
        if command.startswith("dump-guest-memory"):
            return f"Error: {_REFUSAL}\n"
        return self._execute(command)


def _dump(machine: QemuMachine, target: Path, request: DumpRequest) -> DumpReport:
    with (
        connect_qmp(str(machine.qmp_sockets[0])) as qmp,
        open_sink(str(target), force=True, standard_output=None) as sink,
    ):
        access = GuestAccess.by_monitor(_WithoutDumps(qmp.execute), (qmp.address,))
        return dump(request, access, sink, memory=AUTO, progress=ProgressMeter(None))


def _registers(qmp: RawQmp) -> str:
    words = {"command-line": "info registers"}
    return str(qmp.execute("human-monitor-command", **words))


@pytest.fixture(scope="module")
def after_the_bios() -> Iterator[QemuMachine]:
    """A PC whose BIOS has found nothing to boot, and was in several modes before."""
    with stopped_machine(["qemu-system-x86_64"], ["-M", "q35", "-m", "16", "-smp", "2"]) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
            wait_until(lambda: "HLT=1" in _registers(qmp), "the BIOS gives up")
            qmp.execute("stop")
        yield machine


def _descriptors(notes: bytes) -> list[bytes]:
    found = []
    while notes:
        name_size, size, _ = struct.unpack_from("<III", notes)
        start = 12 + (name_size + 3) // 4 * 4
        found.append(notes[start : start + size])
        notes = notes[start + (size + 3) // 4 * 4 :]
    return found


def test_what_was_guessed_is_named_and_nothing_else_differs(
    after_the_bios: QemuMachine, tmp_path: Path
):
    report = _dump(after_the_bios, tmp_path / "ours", DumpRequest(exact=True))
    ours, native = (
        elf_facts(path) for path in (tmp_path / "ours", OracleDumps(after_the_bios, tmp_path).elf)
    )
    assert report.exit_status == EXIT_INCOMPLETE
    (doubt,) = report.doubts
    assert doubt.endswith(_REFUSAL)
    named = set(doubt.partition(" may be otherwise")[0].split(", "))
    assert named == set(_FLAGS.values())
    differing = set()
    pairs = zip(_descriptors(ours.pop("notes")), _descriptors(native.pop("notes")), strict=True)
    for mine, theirs in pairs:
        assert len(mine) == len(theirs)
        offsets = {at & ~3 for at in range(len(mine)) if mine[at] != theirs[at]}
        differing |= {_FLAGS[at] for at in offsets}
    assert differing  # else this machine proves nothing
    assert ours == native


def test_the_default_needs_no_hidden_bits(after_the_bios: QemuMachine, tmp_path: Path):
    report = _dump(after_the_bios, tmp_path / "ours", DumpRequest())
    assert not report.doubts


def test_why_a_register_is_missing_is_said(after_the_bios: QemuMachine, tmp_path: Path):
    report = _dump(after_the_bios, tmp_path / "ours", DumpRequest())
    assert report.exit_status == EXIT_INCOMPLETE
    told = [line for line in report.lines() if line.startswith("incomplete: ")]
    assert len(told) == 2
    assert any(line.startswith("kernel_gs_base is not known") for line in report.lines())
    for line in told:
        assert "has zero for r10, " in line
        assert "QEMU's own notes, which have them, could not be had" in line
        assert line.endswith(_REFUSAL)
