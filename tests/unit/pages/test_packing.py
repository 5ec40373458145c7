from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_dump_ext import third_party
from qemu_dump_ext.errors import DumpWriteError
from qemu_dump_ext.pages import packing_processes
from qemu_dump_ext.pages.packing import Packer
from qemu_dump_ext.pages.packing_processes import PackingProcesses
from qemu_dump_ext.pages.page_packing import Compression, pack_pages
from qemu_dump_ext.pages.pipeline import Buffer
from tests.support.doors import child_environment
from tests.support.waiting import wait_until

PAGE = 4096
ZLIB = Compression("zlib", exact=True)


def page_of(kind: str, number: int) -> bytes:
    match kind:
        case "zero":
            return bytes(PAGE)
        case "last":
            return bytes(PAGE - 1) + b"\x01"
        case "noise":
            return hashlib.shake_128(bytes([number])).digest(PAGE)
        case _:
            return (b"page %d, " % number).ljust(PAGE, b"x")


@given(
    st.lists(st.sampled_from(["zero", "last", "noise", "text"]), min_size=1, max_size=12),
    st.booleans(),
)
def test_pages_are_packed_in_place(kinds, compressed):
    pages = [page_of(kind, number) for number, kind in enumerate(kinds)]
    buffer = bytearray(b"".join(pages))
    compress: Callable[[bytes | memoryview], bytes] = zlib.compress if compressed else bytes
    sizes = pack_pages(memoryview(buffer), PAGE, compress)
    assert len(sizes) == len(pages)
    start = 0
    for page, size in zip(pages, sizes, strict=True):
        packed = bytes(buffer[start : start + size])
        start += size
        if not size:
            assert page == bytes(PAGE)
        elif size == PAGE:
            assert packed == page
            assert not compressed or len(zlib.compress(page)) >= PAGE
        else:
            assert compressed
            assert zlib.decompress(packed) == page


def fill(buffer: Buffer) -> Buffer:
    pages = [
        bytes(PAGE),
        b"some text ".ljust(PAGE, b"."),
        os.urandom(PAGE),
        bytes(PAGE),
        b"z" * PAGE,
    ]
    content = b"".join(pages)
    buffer.view[: len(content)] = content
    return Buffer(buffer.view[: len(content)], buffer.offset)


def children(pid: int) -> set[int]:
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    return {int(word) for word in words}


def descendants(pid: int) -> set[int]:
    return {one for child in children(pid) for one in (child, *descendants(child))}


def wait_until_ended(pids: set[int]) -> None:
    wait_until(lambda: not any(Path(f"/proc/{pid}/fd/0").exists() for pid in pids), "they ended")


def test_processes_pack_what_this_one_would_and_end_with_their_pool():
    before = descendants(os.getpid())
    with PackingProcesses(ZLIB, 3) as packer:
        for room in packer.buffers:
            buffer = fill(room)
            twin = Buffer(memoryview(bytearray(buffer.view)))
            sizes = packer.pack(buffer, PAGE)
            assert sizes == Packer(ZLIB).pack(twin, PAGE)
            assert sizes.tolist().count(0) == 2
            assert buffer.view[: sum(sizes)] == twin.view[: sum(sizes)]
        packing = descendants(os.getpid()) - before
        assert len(packing) == 3
        assert len(children(os.getpid()) & packing) == 1, "it has made the others"
    wait_until_ended(packing)


@pytest.mark.parametrize("first", [True, False])
def test_a_killed_process_is_an_error(first: bool):
    before = descendants(os.getpid())
    with PackingProcesses(ZLIB, 2) as packer:
        for room in packer.buffers[:2]:
            packer.pack(fill(room), PAGE)  # both have come up
        packing = descendants(os.getpid()) - before
        (killed,) = packing & children(os.getpid()) if first else packing - children(os.getpid())
        os.kill(killed, signal.SIGKILL)
        rooms = [fill(room) for room in packer.buffers[:2]]
        with pytest.raises(DumpWriteError, match="packed pages has ended: was it killed"):
            [packer.pack(room, PAGE) for room in rooms]
    wait_until_ended(packing)


@pytest.mark.parametrize("stopped", [True, False])
def test_processes_end_that_do_not_listen(stopped: bool):
    before = descendants(os.getpid())
    with PackingProcesses(ZLIB, 2) as packer:
        if stopped:
            for room in packer.buffers[:2]:
                packer.pack(fill(room), PAGE)
            for pid in descendants(os.getpid()) - before:
                os.kill(pid, signal.SIGSTOP)
        packing = descendants(os.getpid()) - before
        assert packing
    wait_until_ended(packing)


def test_the_time_that_processes_take_is_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing_processes, "_ENDS_SECONDS", 60.0)
    before, known = descendants(os.getpid()), resource.getrusage(resource.RUSAGE_CHILDREN)
    with PackingProcesses(ZLIB, 2) as packer:
        for room in packer.buffers:
            room.view[:] = os.urandom(len(room.view))
            packer.pack(room, PAGE)
        taken = sum(cpu_seconds_of(pid) for pid in descendants(os.getpid()) - before)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    # What is known of one that runs is counted in ticks.
    assert now.ru_utime + now.ru_stime - known.ru_utime - known.ru_stime > taken - 0.05 > 0.05


def cpu_seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_interpreter_is_found_where_its_name_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # as in gdb
    program = third_party.interpreter()
    assert program is not None
    assert os.access(program, os.X_OK)


@pytest.mark.parametrize("program", [None, "/bin/false"])
def test_without_processes_pages_are_packed_here(
    monkeypatch: pytest.MonkeyPatch, program: str | None
):
    monkeypatch.setattr(packing_processes, "interpreter", lambda: program)
    with PackingProcesses(ZLIB, 1) as packer:
        assert packer.pack(fill(packer.buffers[0]), PAGE).tolist().count(0) == 2


def test_a_process_that_packs_imports_little():
    # Each would take a tenth of what it takes one to come up, for each CPU.
    others = {"json", "pathlib", "socket", "subprocess", "qemu_dump_ext.pages.pipeline"}
    program = (
        f"import sys; sys.path[:] = {sys.path!r};"
        " from qemu_dump_ext.pages.page_packing import Compression;"
        f" Compression('zlib').compressor(); print(*{others} & set(sys.modules))"
    )
    argv = [sys.executable, "-S", "-c", program]
    done = subprocess.run(argv, env=child_environment(), capture_output=True, check=True)
    assert not done.stdout.split()


def test_no_process_outlives_a_killed_program():
    program = (
        "import os, time;"
        " from qemu_dump_ext.pages.page_packing import Compression;"
        " from qemu_dump_ext.pages.packing_processes import PackingProcesses;"
        " packer = PackingProcesses(Compression('zlib'), 2);"
        " sizes = [packer.pack(buffer, 4096) for buffer in packer.buffers[:2]];"
        " print(sizes[1].tolist().count(0), flush=True);"
        " time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=child_environment(), stdout=subprocess.PIPE
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"1024\n"
        left = descendants(parent.pid)
        assert len(left) == 2
    finally:
        parent.kill()
        parent.communicate()
    wait_until_ended(left)
