"""Which piece of QEMU's address space is the guest's RAM, and what is not guessed."""

from __future__ import annotations

import pytest

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.qemu import ram_by_evidence as evidence
from qemu_dump_ext.qemu.process import MemoryMapping
from qemu_dump_ext.qemu.qemu_processes import QemuProcess

_MIB = 1 << 20
_RAM = MemoryMapping(0x7F0000000000, 0x7F0000000000 + 64 * _MIB, True, False, 0, 0, "")
_GUARD = MemoryMapping(_RAM.end, _RAM.end + 4096, False, False, 0, 0, "")
_STACK = MemoryMapping(_RAM.start - 8 * _MIB, _RAM.start, True, False, 0, 0, "")
_HALF = _RAM.start + 32 * _MIB
_HALVES = (
    MemoryMapping(_RAM.start, _HALF, True, False, 0, 0, ""),
    MemoryMapping(_HALF, _RAM.end, True, False, 0, 0, ""),
)


def _ram(
    monkeypatch: pytest.MonkeyPatch, mappings: tuple[MemoryMapping, ...], *words: str
) -> dict[int, int]:
    monkeypatch.setattr(evidence, "read_mappings", lambda _pid: mappings)
    command = ("qemu", "-M", "q35", "-m", "64", *words)
    found = evidence.ram_by_evidence(QemuProcess(1, command, "x86_64"))
    return {block.gpa: hva for block, hva in found.blocks.items()}


@pytest.mark.parametrize(
    "mappings",
    [
        (_RAM, _GUARD),
        (_STACK, _RAM, _GUARD),  # of a thread, which touches it
        (_STACK, *_HALVES, _GUARD),  # of which QEMU has advised the kernel otherwise
    ],
)
def test_ram_is_the_piece_of_its_size(
    monkeypatch: pytest.MonkeyPatch, mappings: tuple[MemoryMapping, ...]
):
    assert _ram(monkeypatch, mappings) == {0: _RAM.start, _MIB: _RAM.start + _MIB}


def test_two_pieces_of_its_size_are_no_evidence(monkeypatch: pytest.MonkeyPatch):
    other = MemoryMapping(0x10000000, 0x10000000 + 64 * _MIB, True, False, 0, 0, "/dev/shm/x")
    with pytest.raises(SourceError, match="2 pieces of memory of 64 MiB"):
        _ram(monkeypatch, (other, _RAM, _GUARD))
    with pytest.raises(SourceError, match="no piece"):
        _ram(monkeypatch, (_STACK, _GUARD))


@pytest.mark.parametrize(
    "words",
    [
        ("-M", "q35,max-ram-below-4g=1G"),
        ("-numa", "node,memdev=one"),
        ("-M", "isapc"),
        ("-m", "600G"),
        ("-readconfig", "/absent"),
    ],
)
def test_what_the_command_line_does_not_tell_is_not_guessed(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
):
    with pytest.raises(SourceError, match="info --save"):
        _ram(monkeypatch, (_RAM, _GUARD), *words)
