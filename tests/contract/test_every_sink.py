"""What every file in sinks/ promises, for each way to name a target of its kind."""

from __future__ import annotations

import fcntl
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import qemu_dump_ext.sinks as package
from qemu_dump_ext.errors import DumpWriteError
from qemu_dump_ext.sinks import all_sinks, open_sink, target_forms
from qemu_dump_ext.sinks._declaration import Target
from qemu_dump_ext.sinks._sink import Sink
from tests.support.leftovers import nothing_left

_CHUNKS = (b"head", bytes(70000), memoryview(b"x" * 4096), b"", b"an unaligned end")
_WHOLE = b"".join(_CHUNKS)
_MIB = 1 << 20


@dataclass(frozen=True)
class Place:
    """Somewhere to write to.

    Attributes:
        kind: Name of the sink that takes it.
        word: How it is named.
        received: Returns what is there once the sink is closed; None: nothing is.
        seekable: It can be written at offsets.
        is_new: The dump makes it: nothing is there before, nor after a dump that failed.
        standard_output: What is behind `-`.
    """

    kind: str
    word: str
    received: Callable[[], bytes | None] = lambda: None
    seekable: bool = False
    is_new: bool = False
    standard_output: int | None = None

    def open(self, *, force: bool = False) -> Sink:
        """Return the sink for it."""
        return open_sink(self.word, force=force, standard_output=self.standard_output)


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


@contextmanager
def _file(folder: Path) -> Iterator[Place]:
    path = folder / "dump"
    yield Place("file", str(path), lambda: _read(path), seekable=True, is_new=True)


@contextmanager
def _file_of_a_strange_name(folder: Path) -> Iterator[Place]:
    path = folder / "fd:1 |\udcff"
    yield Place("file", f"file:{path}", lambda: _read(path), seekable=True, is_new=True)


@contextmanager
def _command(folder: Path) -> Iterator[Place]:
    path = folder / "copied"
    yield Place("command", f"|cat > '{path}'", lambda: _read(path))


@contextmanager
def _opened(folder: Path) -> Iterator[Place]:
    path = folder / "opened"
    with path.open("wb") as file:
        yield Place("descriptor", f"fd:{file.fileno()}", lambda: _read(path), seekable=True)


@contextmanager
def _opened_to_append(folder: Path) -> Iterator[Place]:
    path = folder / "appended"
    with path.open("ab") as file:
        yield Place("descriptor", f"fd:{file.fileno()}", lambda: _read(path))


@contextmanager
def _standard_output(folder: Path) -> Iterator[Place]:
    path = folder / "redirected"
    with path.open("wb") as file:
        number = file.fileno()
        yield Place("descriptor", "-", lambda: _read(path), seekable=True, standard_output=number)


@contextmanager
def _pipe(_folder: Path) -> Iterator[Place]:
    reader, writer = os.pipe()
    try:
        yield Place("descriptor", f"fd:{writer}", _what_waits_in(reader))
    finally:
        os.close(writer)
        os.close(reader)


@contextmanager
def _fifo(folder: Path) -> Iterator[Place]:
    path = folder / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield Place("device", str(path), _what_waits_in(reader))
    finally:
        os.close(reader)


def _what_waits_in(reader: int) -> Callable[[], bytes]:
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, _MIB)  # it holds a dump: nobody has to read meanwhile
    os.set_blocking(reader, False)

    def received() -> bytes:
        try:
            return os.read(reader, _MIB)
        except BlockingIOError:
            return b""

    return received


MakePlace = Callable[[Path], AbstractContextManager[Place]]
PLACES: dict[str, MakePlace] = {
    "file": _file,
    "strange name": _file_of_a_strange_name,
    "command": _command,
    "open file": _opened,
    "open to append": _opened_to_append,
    "-": _standard_output,
    "pipe": _pipe,
    "fifo": _fifo,
}


@contextmanager
def _limited_file(folder: Path) -> Iterator[Place]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MIB, before[1]))
    try:
        yield Place("file", str(folder / "dump"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _command_that_reads_nothing(_folder: Path) -> Iterator[Place]:
    yield Place("command", "|exit 3")


@contextmanager
def _pipe_without_a_reader(_folder: Path) -> Iterator[Place]:
    reader, writer = os.pipe()
    os.close(reader)
    yield Place("descriptor", f"fd:{writer}")
    os.close(writer)


@contextmanager
def _full_device(_folder: Path) -> Iterator[Place]:
    yield Place("device", "/dev/full")


# One of each kind to which not all can be written.
TOO_SMALL: dict[str, tuple[MakePlace, str]] = {
    "file": (_limited_file, "cannot write .*/dump: File too large"),
    "command": (_command_that_reads_nothing, "exit 3 ended with status 3 before it had read"),
    "descriptor": (_pipe_without_a_reader, "cannot write fd:[0-9]+: its reader has gone away"),
    "device": (_full_device, "cannot write /dev/full: No space left on device"),
}

_EVERY_KIND = sorted(all_sinks())


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with PLACES[request.param](tmp_path) as made:
        yield made


def test_the_tables_name_every_file(tmp_path: Path):
    files = {path.stem for path in Path(package.__file__).parent.glob("[!_]*.py")}
    kinds = set()
    for name, make in PLACES.items():
        (folder := tmp_path / name.replace("/", "")).mkdir()
        with make(folder) as place:
            kinds.add(place.kind)
    assert files == set(all_sinks()) == kinds == set(TOO_SMALL)


def test_who_is_asked_first_is_settled():
    ranks = [kind.rank for kind in all_sinks().values()]
    assert sorted(set(ranks)) == ranks


@pytest.mark.parametrize("kind", _EVERY_KIND)
def test_how_it_is_written_is_in_the_help(kind: str):
    assert all_sinks()[kind].form in target_forms()


def test_it_takes_its_own_and_leaves_others(place: Place):
    target = Target(place.word, force=False, standard_output=place.standard_output)
    takers = (name for name, kind in all_sinks().items() if kind.make(target) is not None)
    assert next(takers) == place.kind


def test_making_one_touches_nothing(place: Place, tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    with nothing_left():
        place.open()
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_written_in_order_arrives(place: Place):
    with nothing_left():
        with place.open() as sink:
            for chunk in _CHUNKS:
                sink.write(chunk)
        assert sink.bytes_written == len(_WHOLE)
    assert place.received() == _WHOLE


def test_what_is_written_at_offsets_arrives_where_it_can(place: Place):
    with nothing_left(), place.open() as sink:
        assert sink.seekable == sink.can_leave_holes() == place.seekable
        if not place.seekable:
            return
        sink.write_at(9000, b"second")
        sink.write_at(0, memoryview(b"first"))
        sink.set_size(20000)
    assert place.received() == b"first".ljust(9000, b"\0") + b"second".ljust(11000, b"\0")


def test_a_new_file_is_its_owners_alone_and_whole_from_the_first_moment(
    place: Place, tmp_path: Path
):
    with place.open() as sink:
        sink.write(b"half")
        assert not place.is_new or place.received() is None
        for path in tmp_path.iterdir():
            assert not place.is_new or stat.S_IMODE(path.stat().st_mode) == 0o600
        sink.write(b"whole")
    assert place.received() == b"halfwhole"
    assert not list(tmp_path.glob(".*"))


def test_a_dump_that_fails_leaves_nothing(place: Place, tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    with nothing_left(), pytest.raises(KeyError):
        _write(place, b"part of a dump", fail=True)
    if place.is_new:
        assert sorted(tmp_path.iterdir()) == before


def _write(place: Place, *parts: bytes, fail: bool = False) -> None:
    with place.open() as sink:
        for part in parts:
            sink.write(part)
        if fail:
            raise KeyError


def test_room_is_there_before_the_first_byte(place: Place):
    with nothing_left():
        if place.seekable:
            with pytest.raises(DumpWriteError, match=r"no room for .*: the dump takes"):
                _require_too_much(place)
        else:
            _require_too_much(place)


def _require_too_much(place: Place) -> None:
    with place.open() as sink:
        sink.require_room(1 << 62)


def test_there_is_room_beside_it(place: Place):
    assert place.open().directory.is_dir()


@pytest.mark.parametrize("kind", _EVERY_KIND)
def test_what_cannot_be_written_is_told_and_leaves_nothing(kind: str, tmp_path: Path):
    make, message = TOO_SMALL[kind]
    with make(tmp_path) as place, nothing_left():
        with pytest.raises(DumpWriteError, match=message):
            _write(place, *[bytes(1 << 16)] * 128)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", _EVERY_KIND)
def test_what_cannot_be_written_at_its_place_is_told_as_well(kind: str, tmp_path: Path):
    make, _ = TOO_SMALL[kind]
    with make(tmp_path) as place, nothing_left():
        with pytest.raises(DumpWriteError, match="cannot write"):
            _write_far_behind(place)
        assert not list(tmp_path.iterdir())


def _write_far_behind(place: Place) -> None:
    with place.open() as sink:
        sink.write_at(1 << 40, b"far behind")
