from __future__ import annotations

import random
from collections.abc import Collection
from itertools import pairwise

import pytest

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.qemu.dumped_memory import (
    DumpedMemory,
    VirtioMem,
    find_dumped_memory,
    find_plugged,
    keep_within,
)
from qemu_dump_ext.qemu.native_dump import NativeDumps

_BLOCK = 0x200000
_AT = 1 << 32
_VIEW = """\
FlatView #0
 AS "memory", root: system
  0000000000000000-0000000000ffffff (prio 0, ram): pc.ram
  0000000100000000-00000001007fffff (prio 0, ram): v0
"""
_PATH = "/machine/peripheral/vm0"
_DEVICE = {
    "info mtree -f": _VIEW,
    "qom-list /machine/peripheral": "vm0 (child<virtio-mem-pci>)\n",
    f"qom-get {_PATH} memdev": '"/objects/v0"\n',
    f"qom-get {_PATH} memaddr": f"{_AT}\n",
    f"qom-get {_PATH} block-size": f"{_BLOCK}\n",
    f"qom-get {_PATH} size": "0\n",
    "qom-get /objects/v0 size": f"{4 * _BLOCK}\n",
}
_RAM = RamBlock(0, 0x1000000, "pc.ram", 0)
_NO_SPACE = "Error: dump: failed to write elf header: No space left on device\n"
_NOTHING = "Error: dump: no guest memory to dump\n"


class _Monitor:
    def __init__(self, answers: dict[str, str], plugged: Collection[int] | None = None) -> None:
        self._answers = answers
        self._plugged = plugged

    def execute(self, command: str) -> str:
        words = command.split()
        if words[0] == "dump-guest-memory" and self._plugged is not None:
            assert words[1] == "/dev/full"
            gpa, size = (int(word, 16) for word in words[2:])
            numbers = range((gpa - _AT) // _BLOCK, (gpa + size - _AT) // _BLOCK)
            return _NO_SPACE if set(numbers) & set(self._plugged) else _NOTHING
        return self._answers.get(command, "Error: no such thing\n")


def _found(changes: dict[str, str], plugged: Collection[int] | None = None) -> DumpedMemory:
    monitor = _Monitor(_DEVICE | changes, plugged)
    return find_dumped_memory(
        monitor, NativeDumps(monitor, None, None), monitor.execute("info mtree -f")
    )


def test_of_a_device_without_plugged_blocks_nothing_is_dumped():
    found = _found({})
    assert found.blocks == [_RAM]
    assert found.left_out == ("virtio-mem vm0: 0.0 of 8.0 MiB are plugged",)
    assert not found.doubts


def test_of_a_device_that_is_wholly_plugged_everything_is_dumped():
    found = _found({f"qom-get {_PATH} size": f"{4 * _BLOCK}\n"})
    assert found.blocks == [_RAM, RamBlock(_AT, 4 * _BLOCK, "v0", 0)]


def test_the_plugged_blocks_are_dumped():
    found = _found({f"qom-get {_PATH} size": f"{2 * _BLOCK}\n"}, plugged=(1, 3))
    assert found.blocks == [
        _RAM,
        RamBlock(_AT + _BLOCK, _BLOCK, "v0", _BLOCK),
        RamBlock(_AT + 3 * _BLOCK, _BLOCK, "v0", 3 * _BLOCK),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {f"qom-get {_PATH} size": f"{_BLOCK}\n"},
        {f"qom-get {_PATH} size": f"{_BLOCK + 1}\n"},
        {f"qom-get {_PATH} size": f"{5 * _BLOCK}\n"},
        {f"qom-get {_PATH} size": "9" * 5000},
        {f"qom-get {_PATH} block-size": "0\n"},
        {f"qom-get {_PATH} memdev": '"v0"\n'},
        {"qom-get /objects/v0 size": "-1\n"},
    ],
)
def test_what_is_not_known_is_dumped_and_said(changes: dict[str, str]):
    found = _found(changes)
    assert [block.name for block in found.blocks] == ["pc.ram", "v0"]
    assert len(found.doubts) == 1
    assert "all of its blocks are dumped, also those not plugged" in found.doubts[0]


def test_a_confidential_guest_is_named():
    found = _found({"qom-get /machine confidential-guest-support": '"/objects/sev0"\n'})
    assert found.blocks == [_RAM]
    assert "confidential guest /objects/sev0" in found.doubts[0]


def test_no_confidential_guest():
    assert not _found({"qom-get /machine confidential-guest-support": '""\n'}).doubts


def _blocks_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {
        number
        for first, end in ranges
        for number in range((first - _AT) // _BLOCK, (end - _AT) // _BLOCK)
    }


def _ask(plugged: set[int], count: int) -> tuple[set[int], int]:
    questions = 0

    def is_dumped(gpa: int, size: int) -> bool:
        nonlocal questions
        questions += 1
        return not plugged.isdisjoint(_blocks_of([(gpa, gpa + size)]))

    device = VirtioMem("vm0", _AT, count * _BLOCK, _BLOCK, len(plugged) * _BLOCK)
    ranges = find_plugged(device, is_dumped)
    assert ranges == sorted(ranges)
    assert all(end < first for (_, end), (first, _) in pairwise(ranges))
    return _blocks_of(ranges), questions


@pytest.mark.parametrize("seed", range(20))
def test_any_set_of_blocks_is_found(seed: int):
    chosen = random.Random(seed)  # noqa: S311 - the same in every run
    count = chosen.randrange(1, 200)
    plugged = {number for number in range(count) if chosen.random() < seed / 20} or {0}
    assert _ask(plugged, count)[0] == plugged


def test_one_stretch_takes_few_questions():
    plugged = set(range(1234))
    found, questions = _ask(plugged, 1 << 13)
    assert found == plugged
    assert questions < 64


def test_the_search_for_blocks_is_bounded():
    device = VirtioMem("vm0", _AT, 4 * _BLOCK, _BLOCK, _BLOCK)
    with pytest.raises(SourceError, match="longer than 0 s"):
        find_plugged(device, lambda _gpa, _size: True, seconds=0)


def test_what_is_outside_the_bounds_stays():
    blocks = [RamBlock(0, 0x4000, "a", 0x100), RamBlock(0x5000, 0x1000, "b", 0)]
    assert keep_within(blocks, (0x1000, 0x3000), [(0x1800, 0x2000)]) == [
        RamBlock(0, 0x1000, "a", 0x100),
        RamBlock(0x1800, 0x800, "a", 0x1900),
        RamBlock(0x3000, 0x1000, "a", 0x3100),
        RamBlock(0x5000, 0x1000, "b", 0),
    ]
