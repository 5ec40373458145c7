"""What every format of dump_formats/ promises, of a guest of a few pages, in both byte orders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import qemu_dump_ext.dump_formats as package
from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.discovery import collect
from qemu_dump_ext.dump_formats import (
    FormatFamily,
    all_dump_formats,
    find_dump_format,
    format_by_words,
    format_words,
)
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import DumpWriteError, GuestMemoryFaultError, RequestError
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.plan.plan import DumpPlan, GuestSnapshot, make_plan
from qemu_dump_ext.plan.request import DumpRequest, MemoryRange
from qemu_dump_ext.plan.windows_plan import make_windows_plan
from qemu_dump_ext.sinks import Sink, open_sink
from qemu_dump_ext.structures.dialect import MENDED, qemu_dialect
from qemu_dump_ext.structures.utsname import UtsName
from tests.support.fake_guest import BLOCKS, PAGE, content_of
from tests.support.leftovers import nothing_left
from tests.support.plain_memory import KnownMemory, PlainMemory
from tests.support.sample_win_dmp import sample_windows_dump

FORMATS = list(all_dump_formats())
EVERY_FORMAT = pytest.mark.parametrize("name", FORMATS)
_LITTLE, _BIG = "x86_64", "or1k"
EVERY_FORMAT_AND_GUEST = pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name in FORMATS
        for target in (_LITTLE, _BIG)
        if target == _LITTLE or not find_dump_format(name).of_windows
    ],
)
WITH_RANGES = pytest.mark.parametrize(
    "name", [name for name in FORMATS if not find_dump_format(name).of_windows]
)


def _plan(request: DumpRequest, target: str = _LITTLE) -> DumpPlan:
    architecture = all_architectures()[target]
    registers = {register.name: 0x1234 for register in architecture.registers}
    # Pages of the guest's own size, so that both have some of every kind.
    architecture = replace(architecture, page_size=PAGE)
    snapshot = GuestSnapshot(architecture, BLOCKS, [Vcpu(0, registers)], b"", UtsName())
    dialect = qemu_dialect((7, 2, 0)) if request.exact else MENDED
    if find_dump_format(request.format).of_windows:
        core = architecture.cores[0]
        return make_windows_plan(
            core, BLOCKS, BLOCKS, sample_windows_dump(BLOCKS), dialect=dialect, request=request
        )
    whole_pages = find_dump_format(request.format).whole_pages
    return make_plan(snapshot, dialect, request, whole_pages=whole_pages)


def _sink(path: object) -> Sink:
    return open_sink(str(path), force=False, standard_output=None)


def _write(
    request: DumpRequest, path: object, memory: GuestMemory, target: str = _LITTLE
) -> tuple[DumpPlan, list[int]]:
    """Write a dump; return its plan, and what progress was told."""
    dump_format = find_dump_format(request.format)
    steps: list[int] = []
    with _sink(path) as sink:
        dump_format.check(request)
        dump_format.require(request)
        dump_format.check_sink(sink)
        plan = _plan(request, target)
        dump_format.write(request, plan, memory, sink, steps.append)
    return plan, steps


def _requests(name: str) -> list[DumpRequest]:
    """Return the requests that a format can do, of those that change how it is written."""
    wishes = [
        DumpRequest(format=name),
        DumpRequest(format=name, exact=True),
        DumpRequest(format=name, threads=4),
        DumpRequest(format=name, level=1),
        DumpRequest(format=name, omit_zero=True),
        DumpRequest(format=name, sparse=False),
    ]
    return [request for request in wishes if _refusal(request) is None]


def _refusal(request: DumpRequest) -> str | None:
    dump_format = find_dump_format(request.format)
    try:
        dump_format.check(request)
        dump_format.require(request)
    except RequestError as error:
        return str(error)
    return None


def _pages() -> Iterator[tuple[int, bytes]]:
    for block in BLOCKS:
        content = content_of(block)
        for offset in range(0, block.size, PAGE):
            yield block.gpa + offset, content[offset : offset + PAGE]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_files_are_the_families():
    files = {path.stem for path in Path(package.__file__).parent.glob("[!_]*.py")}
    families = collect(package, "FORMATS", FormatFamily)
    assert files == set(families)
    names = [found.name for family in families.values() for found in family.formats()]
    assert names == FORMATS, "no two have the same name"
    codecs = dict.fromkeys(find_dump_format(name).codec for name in names)
    assert format_words() == [codec for codec in codecs if codec]


@EVERY_FORMAT
def test_its_words_are_words(name: str):
    found = find_dump_format(name)
    assert name.replace("-", "").isalnum()
    assert found.extension.isalnum()
    assert found.codec is None or format_by_words(found.codec, raw=found.raw) == name


@EVERY_FORMAT_AND_GUEST
def test_a_reader_finds_what_was_in_the_guest(name: str, target: str, tmp_path: Path):
    for number, request in enumerate(_requests(name)):
        path = tmp_path / str(number)
        with nothing_left():
            plan, steps = _write(request, path, PlainMemory(), target)
        assert sum(steps) >= plan.memory_size
        with open_dump(path) as dump:
            assert dump.byte_order == plan.core.byte_order
            assert any(note.is_prstatus for note in dump.notes) or target == _LITTLE
            for gpa, expected in _pages():
                # Of what is left out nothing is told, and nothing is wrong.
                left_out = request.omit_zero and not any(expected)
                cut_by_qemu = request.exact and len(expected) < PAGE
                if not left_out and not cut_by_qemu:
                    assert dump.read(gpa, len(expected)) == expected
            # QEMU itself counts a page that is not whole where it has none.
            assert request.exact or not verify_dump(dump).problems


@EVERY_FORMAT
def test_the_same_guest_is_the_same_dump_however_it_is_read(name: str, tmp_path: Path):
    request = DumpRequest(format=name)
    _write(request, tmp_path / "plain", PlainMemory())
    _write(replace(request, threads=1), tmp_path / "one thread", PlainMemory())
    _write(request, tmp_path / "known", KnownMemory())
    assert len({_digest(path) for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("name", [name for name in FORMATS if find_dump_format(name).start])
def test_what_was_started_before_writes_the_same_and_starts_nothing(name: str, tmp_path: Path):
    request = DumpRequest(format=name, threads=2)
    plan, _ = _write(request, tmp_path / "at once", PlainMemory())
    start = find_dump_format(name).start
    assert start is not None
    with (
        nothing_left(),
        start(request, 1 << 40) as write,
        nothing_left(),
        _sink(tmp_path / "prepared") as sink,
    ):
        write(request, plan, PlainMemory(), sink, lambda _: None)
    assert _digest(tmp_path / "prepared") == _digest(tmp_path / "at once")


@EVERY_FORMAT
def test_a_pipe_gets_a_whole_dump_or_is_refused_before_the_first_byte(name: str, tmp_path: Path):
    request = DumpRequest(format=name)
    _write(request, tmp_path / "file", PlainMemory())
    copy = tmp_path / "copy"
    try:
        _write(request, f"|cat > '{copy}'", PlainMemory())
    except RequestError:
        assert not copy.exists() or not copy.stat().st_size
    else:
        assert _digest(copy) == _digest(tmp_path / "file")


@WITH_RANGES
def test_of_a_range_there_is_nothing_else(name: str, tmp_path: Path):
    block = BLOCKS[1]
    wanted = MemoryRange(block.gpa + 100, PAGE, is_extension=True)
    plan, _ = _write(
        DumpRequest(format=name, memory_range=wanted), tmp_path / "dump", KnownMemory()
    )
    with open_dump(tmp_path / "dump") as dump:
        ((gpa, size),) = dump.memory_ranges()
        assert plan.memory_size == size
        assert gpa <= wanted.begin
        assert wanted.end <= gpa + size <= block.end
        assert size == (2 * PAGE if find_dump_format(name).whole_pages else PAGE)
        assert dump.read(gpa, size) == content_of(block)[gpa - block.gpa :][:size]


@EVERY_FORMAT
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_that_cannot_be_read_ends_it_and_leaves_nothing(
    name: str, threads: int, tmp_path: Path
):
    request = DumpRequest(format=name, threads=threads)
    broken = PlainMemory(faults_at=BLOCKS[1].gpa + 5)
    with nothing_left(), pytest.raises(GuestMemoryFaultError, match="it is broken there"):
        _write(request, tmp_path / "dump", broken)
    assert not list(tmp_path.iterdir())


@EVERY_FORMAT
def test_a_target_that_cannot_be_written_ends_it(name: str):
    with nothing_left(), pytest.raises((DumpWriteError, RequestError), match=r"/dev/full|seekable"):
        _write(DumpRequest(format=name), "/dev/full", PlainMemory())


@EVERY_FORMAT
def test_an_interrupt_ends_it_and_leaves_nothing(name: str, tmp_path: Path):
    class Interrupted(PlainMemory):
        def read_into(self, gpa: int, buffer: memoryview) -> None:
            if gpa >= BLOCKS[-1].gpa:
                raise KeyboardInterrupt
            super().read_into(gpa, buffer)

    with nothing_left(), pytest.raises(KeyboardInterrupt):
        _write(DumpRequest(format=name), tmp_path / "dump", Interrupted())
    assert not list(tmp_path.iterdir())


@EVERY_FORMAT
def test_what_it_has_not_is_refused_in_one_line(name: str):
    for request in (
        DumpRequest(format=name, paging=True),
        DumpRequest(format=name, level=99),
        DumpRequest(format=name, omit_zero=True, exact=True),
        DumpRequest(format=name, memory_range=MemoryRange(0, 1)),
    ):
        refusal = _refusal(request)
        assert refusal is None or (refusal.strip() and "\n" not in refusal)


@EVERY_FORMAT
def test_what_qemu_says_of_a_target_is_one_line(name: str):
    for has_begun in (False, True):
        said = find_dump_format(name).failure(has_begun, "No space left on device")
        assert said.startswith(("dump: failed to ", "win-dump: failed to "))
        assert "\n" not in said
