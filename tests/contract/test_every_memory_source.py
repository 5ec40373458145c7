"""What every file in memory_sources/ promises, of a guest of a few pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import qemu_dump_ext.memory_sources as package
from qemu_dump_ext.errors import GuestMemoryFaultError, RequestError, SourceError
from qemu_dump_ext.guest.access import SourceContext
from qemu_dump_ext.guest.memory import GuestMemory, PartialMemory, is_sparse
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.memory_sources import (
    AUTO,
    all_memory_sources,
    memory_source_states,
    open_memory,
)
from qemu_dump_ext.qemu import shared_directory
from tests.support.fake_guest import PAGE, FakeGuest, FakeMonitor, content_of, fake_guest
from tests.support.leftovers import nothing_left

EVERY_SOURCE = pytest.mark.parametrize("name", all_memory_sources())
_BEHIND = 0x80000000
_RUBBISH = {
    "nothing": "",
    "refusal": "Error: no\n",
    "unknown": "unknown command: 'x'\n",
    "text": "\0\x1b[31m\udcff\n" * 100,
    "long number": f"Host virtual address for 0x0 (ram) is 0x{'f' * 5000}\n",
    "null": "null\n",
    "number": "-1\n",
    "nested": "[" * 100_000,
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGuest]:
    with fake_guest(tmp_path_factory.mktemp("guest")) as guest:
        yield guest


@pytest.fixture
def guest(
    started: FakeGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeGuest]:
    """The guest, in which nothing may be left as it was not before."""
    (shared := tmp_path / "shared").mkdir()
    monkeypatch.setattr(shared_directory, "_IN_MEMORY", shared)
    started.answers.clear()
    started.commands.clear()
    with nothing_left():
        yield started
    assert not list(shared.iterdir())
    assert not started.is_physical
    assert not started.runs


def _blocks_of(memory: GuestMemory, guest: FakeGuest) -> list[RamBlock]:
    missing = memory.missing_blocks if isinstance(memory, PartialMemory) else ()
    return [block for block in guest.blocks if block not in missing]


def _read(memory: GuestMemory, gpa: int, size: int) -> bytes:
    buffer = bytearray(b"\xee" * size)
    memory.read_into(gpa, memoryview(buffer))
    return bytes(buffer)


def test_the_files_are_the_sources():
    files = {path.stem for path in Path(package.__file__).parent.glob("[!_]*.py")}
    assert files == set(all_memory_sources())


def test_which_is_the_faster_is_settled():
    ranks = [source.rank for source in all_memory_sources().values()]
    assert sorted(set(ranks)) == ranks
    assert AUTO not in all_memory_sources()


@EVERY_SOURCE
def test_it_reads_what_is_there(guest: FakeGuest, name: str):
    with all_memory_sources()[name].open(guest.context) as memory:
        assert memory.name == name
        blocks = _blocks_of(memory, guest)
        assert blocks
        for block in blocks:
            assert _read(memory, block.gpa, block.size) == content_of(block)
        for block in reversed(blocks):
            for gpa, size in ((block.gpa, 1), (block.end - 1, 1), (block.gpa + PAGE - 3, 7)):
                assert _read(memory, gpa, size) == guest.read(gpa, size)


@EVERY_SOURCE
def test_it_reads_forward_in_small_steps(guest: FakeGuest, name: str):
    with all_memory_sources()[name].open(guest.context) as memory:
        for block in _blocks_of(memory, guest):
            step = PAGE // 2
            parts = [_read(memory, gpa, step) for gpa in range(block.gpa, block.end, step)]
            assert b"".join(parts) == content_of(block)


@EVERY_SOURCE
def test_memory_that_is_not_there_is_a_fault(guest: FakeGuest, name: str):
    with all_memory_sources()[name].open(guest.context) as memory:
        last = _blocks_of(memory, guest)[-1]
        for gpa, size in ((_BEHIND, 1), (_BEHIND, 3 * PAGE), (last.end, 1), (last.end - 1, 2)):
            with pytest.raises(GuestMemoryFaultError, match=f"at {gpa:#x}|at {last.end:#x}"):
                _read(memory, gpa, size)
        assert _read(memory, last.gpa, PAGE) == guest.read(last.gpa, PAGE), "goes on all the same"


@EVERY_SOURCE
def test_what_it_says_is_zero_is(guest: FakeGuest, name: str):
    with all_memory_sources()[name].open(guest.context) as memory:
        if not is_sparse(memory):
            return
        for block in _blocks_of(memory, guest):
            for gpa, end in (
                (block.gpa, block.end),
                (block.gpa + 5, block.end - 5),
                (block.gpa + 2 * PAGE + 1, block.gpa + 2 * PAGE + 2),
            ):
                ranges = memory.populated(gpa, end - gpa)
                edges = [gpa, *(edge for pair in ranges for edge in pair), end]
                assert edges == sorted(edges)
                assert all(low < high for low, high in ranges)
                for low, high in pairwise(edges):
                    if (low, high) not in ranges:
                        assert not any(guest.read(low, high - low))


@EVERY_SOURCE
def test_what_it_has_not_is_named(guest: FakeGuest, name: str):
    with all_memory_sources()[name].open(guest.context) as memory:
        if isinstance(memory, PartialMemory):
            missing = list(memory.missing_blocks)
            assert missing == [block for block in guest.blocks if block in missing]
            for block in missing:
                with pytest.raises(GuestMemoryFaultError):
                    _read(memory, block.gpa, 1)


@EVERY_SOURCE
def test_closing_it_twice_is_harmless(guest: FakeGuest, name: str):
    with all_memory_sources()[name].open(guest.context) as memory:
        _read(memory, 0, PAGE)
        memory.close()
        memory.close()


@EVERY_SOURCE
def test_it_gives_back_what_it_holds_after_an_error_as_well(guest: FakeGuest, name: str):
    with pytest.raises(KeyboardInterrupt):
        _read_and_fail(guest.context, name)


def _read_and_fail(context: SourceContext, name: str) -> None:
    with all_memory_sources()[name].open(context) as memory:
        _read(memory, 0, 2 * PAGE)
        raise KeyboardInterrupt


@EVERY_SOURCE
def test_it_asks_the_monitor_for_nothing_that_changes_the_guest(guest: FakeGuest, name: str):
    with open_memory(name, guest.context) as opened:
        _read(opened.memory, 0, PAGE)
    words = {command.partition(" ")[0] for command in guest.commands}
    assert words <= {"gpa2hva", "info", "pmemsave", "qom-get", "xp"}


@EVERY_SOURCE
def test_where_it_is_not_possible_it_says_so(guest: FakeGuest, name: str):
    guest.answers[""] = "unknown command\n"
    nothing = SourceContext(FakeMonitor(guest), None, guest.blocks)
    with pytest.raises(SourceError) as caught, all_memory_sources()[name].open(nothing) as memory:
        _read(memory, 0, PAGE)
    assert str(caught.value).strip()
    assert "\n" not in str(caught.value)


@EVERY_SOURCE
@pytest.mark.parametrize("rubbish", _RUBBISH)
def test_a_monitor_that_makes_no_sense_is_an_error_like_any_other(
    guest: FakeGuest, name: str, rubbish: str
):
    guest.answers = dict.fromkeys(("gpa2hva", "pmemsave", "qom-"), _RUBBISH[rubbish])
    with suppress(SourceError), all_memory_sources()[name].open(guest.context) as memory:
        # It does not ask this, or can tell all the same.
        assert _read(memory, 0, PAGE) == guest.read(0, PAGE)


@EVERY_SOURCE
def test_it_can_be_chosen_and_others_bring_what_it_has_not(guest: FakeGuest, name: str):
    with open_memory(name, guest.context) as opened:
        assert opened.memory.name.split("+")[0] == name
        assert not opened.passed_over
        for block in guest.blocks:
            assert _read(opened.memory, block.gpa, block.size) == content_of(block)


@EVERY_SOURCE
def test_it_is_not_taken_when_the_monitor_sees_other_memory(guest: FakeGuest, name: str):
    guest.answers["xp /64xb"] = "0000: " + " ".join(["0x11"] * 64)
    with (
        pytest.raises(SourceError, match=f"{name}: it reads other memory than the monitor"),
        open_memory(name, guest.context),
    ):
        pass


def test_auto_takes_the_fastest_that_works(guest: FakeGuest):
    sources = list(all_memory_sources())
    with open_memory(AUTO, guest.context) as opened:
        assert opened.memory.name.split("+")[0] == sources[0]
    with open_memory(AUTO, replace(guest.context, addresses=(), qmp=None)) as opened:
        assert opened.memory.name == "pmemsave"
        assert [name for name, _ in opened.passed_over] == sources[: sources.index("pmemsave")]


def test_where_one_fails_in_the_middle_auto_goes_on_with_the_next(guest: FakeGuest, tmp_path: Path):
    first, *_, last = guest.blocks
    with open_memory(AUTO, replace(guest.context, addresses=(), qmp=None)) as opened:
        assert _read(opened.memory, first.gpa, PAGE) == guest.read(first.gpa, PAGE)
        for path in (tmp_path / "shared").glob("qemu-dump-*"):
            shutil.rmtree(path)
        for block in (last, first):
            assert _read(opened.memory, block.gpa, block.size) == content_of(block)
        assert opened.memory.name == "pmemsave then gdbstub"
        assert opened.memory.is_slow
        assert "(somebody removed it during the dump)" in dict(opened.passed_over)["pmemsave"]
        with pytest.raises(GuestMemoryFaultError):
            _read(opened.memory, _BEHIND, 1)


def test_a_source_that_was_asked_for_is_not_left_for_another(guest: FakeGuest, tmp_path: Path):
    with open_memory("pmemsave", guest.context) as opened:
        for path in (tmp_path / "shared").glob("qemu-dump-*"):
            shutil.rmtree(path)
        with pytest.raises(SourceError, match="Could not open"):
            _read(opened.memory, guest.blocks[-1].gpa, PAGE)


def test_an_unknown_source_is_refused(guest: FakeGuest):
    with pytest.raises(RequestError, match="known: auto, "), open_memory("toy", guest.context):
        pass


def test_every_source_tells_its_state(guest: FakeGuest):
    expected = dict.fromkeys(all_memory_sources())
    assert dict(memory_source_states(guest.context)) == expected
    without = replace(guest.context, stub=None)
    assert dict(memory_source_states(without))["gdbstub"]
