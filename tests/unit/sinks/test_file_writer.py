from __future__ import annotations

import hashlib
import mmap
import os
import threading
from pathlib import Path

import pytest

from qemu_dump_ext.sinks import _direct_io as direct_io
from qemu_dump_ext.sinks import _file_writer
from qemu_dump_ext.sinks._direct_io import BLOCK_SIZE, DirectWriter
from qemu_dump_ext.sinks._file_writer import FileWriter

MIB = 1 << 20


@pytest.fixture
def descriptor(tmp_path):
    number = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    yield number
    os.close(number)


@pytest.fixture
def area():
    view = memoryview(mmap.mmap(-1, 2 * MIB))
    view[:] = hashlib.shake_128(b"file").digest(2 * MIB)
    return view


@pytest.fixture
def direct(descriptor):
    writer = DirectWriter(descriptor)
    yield writer
    writer.close()


def test_whole_blocks_are_written_directly(direct, descriptor, area):
    assert direct.write(3 * BLOCK_SIZE, area[: 100 * BLOCK_SIZE + 5]) == 100 * BLOCK_SIZE
    assert os.pread(descriptor, MIB, 3 * BLOCK_SIZE) == area[: 100 * BLOCK_SIZE]


@pytest.mark.parametrize(
    ("offset", "start", "size"),
    [(1, 0, MIB), (512, 0, MIB), (0, 0, BLOCK_SIZE)],
    ids=["offset", "sector", "small"],
)
def test_what_is_not_aligned_is_left_to_the_usual_way(
    direct, descriptor, area, offset, start, size
):
    assert direct.write(offset, area[start : start + size]) == 0
    assert os.fstat(descriptor).st_size == 0
    assert direct.write(0, area) == len(area), "the next one is written directly again"


def test_memory_that_is_not_aligned_is_written_where_the_file_system_takes_it(
    direct, descriptor, area
):
    """A tmpfs does."""
    written = direct.write(0, area[8 : 8 + MIB])
    assert written in {0, MIB}
    assert os.pread(descriptor, 2 * MIB, 0) == area[8 : 8 + written]
    assert direct.write(0, area) == len(area), "the next one is written directly again"


def test_a_slow_disk_gets_help(direct, area, monkeypatch):
    monkeypatch.setattr(direct_io, "_TRIAL", 2 * len(area))
    monkeypatch.setattr(direct_io, "_SLOW", 1 << 60)
    written = [direct.write(number * len(area), area) for number in range(4)]
    assert written == [len(area), len(area), 0, 0]


@pytest.mark.parametrize("can_be_direct", [True, False])
def test_everything_lands_where_it_belongs(tmp_path, descriptor, area, monkeypatch, can_be_direct):
    if not can_be_direct:
        monkeypatch.setattr(DirectWriter, "write", lambda *_: 0)
    writer = FileWriter(descriptor)
    expected = b""
    for size in 3 * (1, len(area), 16, 4095, MIB, 70000, 1):
        writer.append(area[:size])
        expected += area[:size]
    far = 32 * MIB + BLOCK_SIZE
    writer.write_at(far, area[:-1])
    writer.finish()
    writer.close()
    content = (tmp_path / "file").read_bytes()
    assert content[: len(expected)] == expected
    assert content[len(expected) : far].strip(b"\0") == b""
    assert content[far:] == area[:-1]


def test_a_disk_that_is_full_is_an_error(descriptor, area, monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    writer = FileWriter(descriptor)
    writer.append(area[:100])
    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="No space left"):
        writer.finish()
    writer.close()


def test_more_is_taken_while_the_disk_is_busy(tmp_path, descriptor, area, monkeypatch):
    write, has_more = os.pwrite, threading.Event()

    def write_later(*arguments) -> int:
        assert has_more.wait(20)
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", write_later)
    writer = FileWriter(descriptor)
    for part in (area, area, area):  # a half more than is written at once
        writer.append(part)
    has_more.set()
    writer.finish()
    writer.close()
    assert (tmp_path / "file").read_bytes() == bytes(area) * 3


def test_what_could_not_be_written_is_told_though_more_could_be(descriptor, area, monkeypatch):
    write = os.pwrite

    def refuse_the_start(number: int, view: memoryview, offset: int) -> int:
        if offset == 0:
            raise OSError(28, "No space left on device")
        return write(number, view, offset)

    monkeypatch.setattr(os, "pwrite", refuse_the_start)
    writer = FileWriter(descriptor)
    for part in (area, area, area):
        writer.append(part)
    with pytest.raises(OSError, match="No space left"):
        writer.finish()
    writer.close()


def test_nothing_is_left_where_there_is_no_memory(descriptor, monkeypatch):
    def refuse(_size: int) -> memoryview:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(_file_writer, "private_memory", refuse)
    threads, files = set(threading.enumerate()), set(Path("/proc/self/fd").iterdir())
    with pytest.raises(OSError, match="allocate"):
        FileWriter(descriptor)
    assert set(threading.enumerate()) <= threads
    assert set(Path("/proc/self/fd").iterdir()) <= files
