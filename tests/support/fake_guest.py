"""A guest of a few pages: real memory in a real process, and a monitor, stub and QMP made of text.

What memory sources look at on the host is what it would be of QEMU: a process at the other end of
a socket, a memfd that it has mapped, private memory with pages that were never touched. Only the
answers are made up.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_dump_ext.errors import GuestMemoryFaultError, MonitorAnswerError, SourceError
from qemu_dump_ext.guest.access import GuestAccess, SourceContext
from qemu_dump_ext.guest.model import RamBlock
from tests.support.sample_elf import Load, make_elf

PAGE = 4096
_RAM = "ram"
BLOCKS = (
    RamBlock(0x0, 8 * PAGE, _RAM, 0),
    RamBlock(0x40000000, 4 * PAGE, _RAM, 8 * PAGE),
    RamBlock(0xFFFC0000, 2 * PAGE + 0x800, "rom", 0),
)
"""RAM in two parts, which a memfd backs; a boot ROM in private memory, whose end is no page's."""
_PAGES = {
    (_RAM, 0): b"\x7f" + bytes(PAGE - 1),
    (_RAM, 1): (b"text of the kernel, " * 300)[:PAGE],
    (_RAM, 4): hashlib.shake_128(b"page 4").digest(PAGE),
    (_RAM, 7): bytes(PAGE - 1) + b"\x01",
    (_RAM, 8): hashlib.shake_128(b"page 8").digest(PAGE),
    (_RAM, 11): b"\xa5" * PAGE,
    ("rom", 0): hashlib.shake_128(b"rom").digest(PAGE),
    ("rom", 2): b"\x5a" * 0x800,
}
"""By region and page of it; all others were never touched."""

# Prints where it has its memory, then lives as long as its standard input is open.
_PROCESS = f"""
import ctypes, json, mmap, os, socket, sys
size, private_size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
file = os.memfd_create("guest-ram")
os.ftruncate(file, size)
regions = {{"{_RAM}": mmap.mmap(file, size), "rom": mmap.mmap(-1, private_size, mmap.MAP_PRIVATE)}}
for region, page, content in json.loads(sys.stdin.readline()):
    data = bytes.fromhex(content)
    regions[region][{PAGE} * page : {PAGE} * page + len(data)] = data
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
where = {{
    name: ctypes.addressof(ctypes.c_char.from_buffer(region)) for name, region in regions.items()
}}
print(json.dumps(where), flush=True)
connection, _ = listener.accept()
sys.stdin.read()
"""


def content_of(block: RamBlock) -> bytes:
    """Return all that is in one of BLOCKS."""
    first = block.region_offset // PAGE
    pages = [_PAGES.get((block.name, first + i), b"") for i in range(-(-block.size // PAGE))]
    return b"".join(page.ljust(PAGE, b"\0") for page in pages)[: block.size]


@dataclass
class FakeGuest:
    """A stopped guest, and the ways to it.

    Attributes:
        blocks: Its memory, by ascending gpa.
        cpu_type: QOM type of its CPU.
        registers: What `info registers` shows of its only vCPU.
        hva: Where its process has a region, by name.
        address: Of the socket by which its process is connected to this one.
        answers: What the monitor answers instead, by the beginning of the command.
        commands: What the monitor was asked, in order.
        is_physical: The stub is in its physical memory mode.
        runs: It is not stopped.
    """

    blocks: tuple[RamBlock, ...]
    cpu_type: str
    registers: str
    hva: Mapping[str, int]
    address: str

    def __post_init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.commands: list[str] = []
        self.is_physical = False
        self.runs = False

    def read(self, gpa: int, size: int) -> bytes:
        """Return what is at `gpa`."""
        for block in self.blocks:
            if block.gpa <= gpa and gpa + size <= block.end:
                return content_of(block)[gpa - block.gpa :][:size]
        raise GuestMemoryFaultError(gpa, size, "there is none")

    @property
    def access(self) -> GuestAccess:
        """All ways that a door can have."""
        return GuestAccess.by_qmp(FakeQmp(self), FakeStub(self))

    @property
    def context(self) -> SourceContext:
        """What memory sources get."""
        return self.access.source_context(self.blocks, None)


class FakeMonitor:
    """QEMU's human monitor."""

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest

    def execute(self, command: str) -> str:
        """Answer in QEMU's form."""
        guest = self._guest
        guest.commands.append(command)
        for beginning, answer in guest.answers.items():
            if command.startswith(beginning):
                return answer
        word, _, rest = command.partition(" ")
        answerer = getattr(self, f"_{word.replace('-', '_')}", None)
        return answerer(rest) if answerer else f"unknown command: '{word}'\n"

    def begin(self, command: str) -> Callable[[], str]:
        """Answer later."""
        answer = self.execute(command)
        return lambda: answer

    def _info(self, what: str) -> str:
        status = "running" if self._guest.runs else "paused (prelaunch)"
        ranges = "".join(
            f"  {b.gpa:016x}-{b.end - 1:016x} (prio 0, ram): {b.name} @{b.region_offset:016x}\n"
            for b in self._guest.blocks
        )
        return {
            "version": "7.2.22\n",
            "chardev": "compat_monitor0: filename=unix:/run/fake.qmp,server=on\n",
            "status": f"VM status: {status}\n",
            "dump": "Status: none\n",
            "kvm": "kvm support: disabled\n",
            "cpus": "* CPU #0: thread_id=1\n",
            "registers -a": f"\nCPU#0\n{self._guest.registers}\n",
            "mtree -f": f'FlatView #0\n AS "memory", root: system\n{ranges}\n',
        }.get(what, f"unknown command: 'info {what}'\n")

    def _stop(self, _rest: str) -> str:
        self._guest.runs = False
        return ""

    def _cont(self, _rest: str) -> str:
        self._guest.runs = True
        return ""

    def _qom_list(self, path: str) -> str:
        return {
            "/": "machine (child<fake-machine>)\n",
            "/machine": f"type (string)\ncpu (child<{self._guest.cpu_type}>)\n",
        }.get(path, "type (string)\n")

    def _qom_get(self, words: str) -> str:
        path, name = words.split()
        known = {"share": True, "size": 12 * PAGE} if path == f"/objects/{_RAM}" else {}
        if name not in known:
            return f"Error: Property 'memory-backend-memfd.{name}' not found\n"
        return json.dumps(known[name]) + "\n"

    def _gpa2hva(self, word: str) -> str:
        gpa = int(word, 0)
        for block in self._guest.blocks:
            if block.gpa <= gpa < block.end:
                hva = self._guest.hva[block.name] + block.region_offset + gpa - block.gpa
                return f"Host virtual address for {gpa:#x} ({block.name}) is {hva:#x}\n"
        return f"No memory is mapped at address {gpa:#x}\n"

    def _xp(self, words: str) -> str:
        form = re.fullmatch(r"/(\d+)x([bw]) (\w+)", words)
        assert form is not None, words
        width = {"b": 1, "w": 4}[form[2]]
        gpa = int(form[3], 0)
        data = self._guest.read(gpa, int(form[1]) * width)
        values = [int.from_bytes(data[at : at + width], "big") for at in range(0, len(data), width)]
        lines = []
        for at in range(0, len(values), 8):
            shown = " ".join(f"0x{value:0{2 * width}x}" for value in values[at : at + 8])
            lines.append(f"{gpa + at * width:016x}: {shown}\n")
        return "".join(lines)

    def _pmemsave(self, words: str) -> str:
        gpa, size, path = shlex.split(words)
        try:
            data = self._guest.read(int(gpa, 0), int(size, 0))
            Path(path).write_bytes(data)
        except OSError as error:
            return f"Error: Could not open '{path}': {error.strerror}\n"
        except SourceError as error:
            return f"Error: {error}\n"
        return ""


class FakeStub:
    """A gdbstub with a debugger in front of it."""

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest

    def addresses(self) -> Sequence[str]:
        """Tell none: the socket of QMP leads to the process."""
        return ()

    def packet(self, text: str) -> str:
        """Answer the packets of the memory mode; all others are unsupported."""
        if text == "qqemu.PhyMemMode":
            return "1" if self._guest.is_physical else "0"
        mode = re.fullmatch("Qqemu.PhyMemMode:([01])", text)
        if mode is None:
            return ""
        self._guest.is_physical = mode[1] == "1"
        return "OK"

    def read(self, address: int, buffer: memoryview) -> None:
        """Fill `buffer`; no virtual address is mapped."""
        if not self._guest.is_physical:
            raise GuestMemoryFaultError(address, len(buffer), "Cannot access memory")
        buffer[:] = self._guest.read(address, len(buffer))

    def flush(self) -> None:
        """Nothing is cached."""

    def vcpus(self) -> Iterator[int]:
        """There is one."""
        yield 0


class FakeQmp(FakeMonitor):
    """QEMU's QMP, and its human monitor, by a socket that passes descriptors."""

    passes_descriptors = True

    def __init__(self, guest: FakeGuest) -> None:
        super().__init__(guest)
        self.address = guest.address
        self._descriptors: dict[str, int] = {}

    def listening(self, _hear: Callable[[Mapping[str, Any]], None]) -> AbstractContextManager[None]:
        """There are no events."""
        return contextlib.nullcontext()

    def hand_over(self, descriptor: int, name: str) -> None:
        """Keep a descriptor for a command that names it."""
        self._descriptors[name] = os.dup(descriptor)

    def begin_qmp(
        self, command: str, arguments: dict[str, object] | None = None
    ) -> Callable[[], Any]:
        """Execute it, and answer later."""
        if command in {"stop", "cont"}:
            self._guest.runs = command == "cont"
            return dict
        if command == "query-status":
            return lambda: {"status": "running" if self._guest.runs else "prelaunch"}
        handler = {"dump-guest-memory": self._dump, "closefd": self._close}.get(command)
        try:
            if handler is None:
                raise MonitorAnswerError(command, "The command has not been found")
            handler(arguments or {})
        except SourceError as error:
            return self._refusing(error)
        return dict

    def _refusing(self, error: SourceError) -> Callable[[], Any]:
        def answer() -> Any:
            raise error

        return answer

    def _dump(self, arguments: Mapping[str, Any]) -> None:
        descriptor = self._descriptors.pop(arguments["protocol"].removeprefix("fd:"))
        try:
            gpa = arguments["begin"]
            content = make_elf([Load(gpa, self._guest.read(gpa, arguments["length"]))])
            while content:
                del content[: os.write(descriptor, content)]
        finally:
            os.close(descriptor)

    def _close(self, arguments: Mapping[str, Any]) -> None:
        with contextlib.suppress(KeyError):
            os.close(self._descriptors.pop(arguments["fdname"]))


@contextmanager
def fake_guest(
    folder: Path,
    *,
    cpu_type: str = "any-or1k-cpu",
    registers: str = "PC=00000100\nR00=00000000 R01=deadbeef\n",
) -> Iterator[FakeGuest]:
    """Start a process that has the memory, and connect to it.

    Args:
        folder: For its socket.
        cpu_type: QOM type of the CPU.
        registers: What the monitor shows of the vCPU.
    """
    shared = sum(block.size for block in BLOCKS if block.name == _RAM)
    private = 3 * PAGE
    pages = [(region, page, data.hex()) for (region, page), data in _PAGES.items()]
    path = folder / "monitor"
    words: Sequence[object] = (sys.executable, "-IS", "-c", _PROCESS, shared, private, path)
    process = subprocess.Popen(
        list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process, socket.socket(socket.AF_UNIX) as connection:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(pages) + "\n")
        process.stdin.flush()
        where = json.loads(process.stdout.readline())
        connection.connect(str(path))
        yield FakeGuest(BLOCKS, cpu_type, registers, where, str(path))
