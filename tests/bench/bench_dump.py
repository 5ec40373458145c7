"""Measure our dumps against QEMU's own, in turn, on one stopped Linux guest with real content.

    .venv/bin/python -m tests.bench.bench_dump [--memory MIB] [--fill MIB] [--rounds N] [--json]
    .venv/bin/python -m tests.bench.bench_dump --sparse [--memory MIB] [--fill MIB] ...
    .venv/bin/python -m tests.bench.bench_dump --small [--memory MIB] ...

Prints a table in Markdown: medians, and ratios in which more than 1 means that ours is better.
`--sparse` measures a guest that has touched little of much memory; it never runs, nor does that of
`--small`, whose dump is hardly more than its start.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import queue
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

from qemu_dump_ext.cli.dump_command import main as dump_main
from qemu_dump_ext.engine import stopped_guest as engine
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import BootedGuest, QemuMachine, stopped_machine
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from qemu_dump_ext.host_limits import private_memory
from qemu_dump_ext.linux.page_filter import FilterRules
from qemu_dump_ext.memory_sources.process import ProcessMemory
from qemu_dump_ext.page_codecs import all_page_codecs
from qemu_dump_ext.pages.dedup import deduplicator
from qemu_dump_ext.pages.packing_processes import PackingProcesses
from qemu_dump_ext.pages.page_packing import Compression
from qemu_dump_ext.pages.pipeline import (
    PIECE_SIZE,
    Buffer,
    Piece,
    PieceWork,
    buffer_count,
    cut,
    read_through,
    worker_count,
)
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.sinks._file_writer import FileWriter
from tests.support.doors import GDB_SCRIPT, child_environment, cli_argv, gdb_argv
from tests.support.measured import run_measured
from tests.support.raw_qmp import RawQmp

MIB = 1 << 20
_PAGE = 4096
_MANY_WORKERS, _PACKING_SECONDS = 16, 0.001
"""As on a machine with many CPUs, which pack a piece in no time."""


@dataclass(frozen=True)
class Measurement:
    """One dump.

    Attributes:
        seconds: Wall time.
        size: Of the file, in bytes.
        stopped_seconds: For which the guest stood still.
        peak_rss: Memory of our process, in bytes.
        cpu_seconds: Of our process, or of QEMU's for a dump of its own. Where other work shares
            the machine, their ratio tells more than that of wall times.
        growth: Of QEMU's own memory, page tables included, in bytes.
    """

    seconds: float
    size: int
    stopped_seconds: float
    peak_rss: int
    cpu_seconds: float
    growth: int


Dump = Callable[[QemuMachine, Path], Measurement]


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        name: Of the row.
        native: Takes what it is compared with into a file: QEMU's own dump, or gdb's.
        run: Takes our dump into a file.
        runs: The guest runs where the dump lets it.
    """

    name: str
    native: Dump
    run: Dump
    runs: bool = False


def by_qemu(dump_format: str, *, paging: bool = False) -> Dump:
    """Let QEMU dump; the guest stands still meanwhile."""

    def run(machine: QemuMachine, path: Path) -> Measurement:
        return _native_dump(machine, dump_format, path, paging=paging)

    return run


def _native_dump(
    machine: QemuMachine, dump_format: str, path: Path, *, paging: bool
) -> Measurement:
    with RawQmp(machine.qmp_sockets[1], timeout_seconds=600) as qmp:
        before, used = memory_of(machine.pid), cpu_seconds_of(machine.pid)
        started = time.perf_counter()
        qmp.execute(
            "dump-guest-memory",
            paging=paging,
            protocol=f"file:{path}",
            format=dump_format,
        )
        seconds = time.perf_counter() - started
    used = cpu_seconds_of(machine.pid) - used
    growth = memory_of(machine.pid) - before
    return Measurement(seconds, path.stat().st_size, seconds, 0, used, growth)


def by_makedumpfile(machine: QemuMachine, path: Path) -> Measurement:
    """Let QEMU write its ELF core, and makedumpfile make a kdump of level 31 of it."""
    whole = path.with_suffix(".elf")
    first = by_qemu("elf")(machine, whole)
    _move_program_headers(whole)
    argv = ["makedumpfile", "-c", "-d", "31", whole, path]
    cost = run_measured(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole.unlink()
    if cost.status:
        raise SystemExit(f"{argv} failed")
    return replace(
        first,
        seconds=first.seconds + cost.seconds,
        size=path.stat().st_size,
        cpu_seconds=first.cpu_seconds + cost.cpu_seconds,
    )


def _move_program_headers(path: Path) -> None:
    # Where makedumpfile wants them, which refuses QEMU's cores as they are, with or without
    # VMCOREINFO: section headers, which it does not need, are in between.
    with path.open("r+b") as file:
        head = bytearray(file.read(_ELF_HEADER_SIZE))
        (offset,) = struct.unpack_from("<Q", head, _ELF_PHOFF)
        size, count = struct.unpack_from("<HH", head, _ELF_PHENTSIZE)
        file.seek(offset)
        headers = file.read(size * count)
        struct.pack_into("<Q", head, _ELF_PHOFF, _ELF_HEADER_SIZE)
        file.seek(0)
        file.write(head + headers)


_ELF_HEADER_SIZE, _ELF_PHOFF, _ELF_PHENTSIZE = 64, 0x20, 0x36
"""Of Elf64_Ehdr."""


def memory_of(pid: int) -> int:
    """Return the bytes that a process has, page tables included."""
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    wanted = [line.split() for line in lines if line.startswith(("VmRSS:", "VmPTE:"))]
    return sum(int(words[1]) << 10 for words in wanted)


def cpu_seconds_of(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def our_dump(machine: QemuMachine, argv: Sequence[str], path: Path) -> Measurement:
    """Run a program of ours that takes the dump and reports in JSON on its output."""
    before = memory_of(machine.pid)
    with tempfile.TemporaryFile("w+") as output:
        # As usual, Python keeps what it has compiled; but here not in the tree.
        environment = child_environment(
            PYTHONDONTWRITEBYTECODE=None, PYTHONPYCACHEPREFIX=str(path.parent / "compiled")
        )
        if argv[0] == "gdb":
            del environment["PYTHONPATH"]
        cost = run_measured(argv, stdout=output, env=environment, stdin=subprocess.DEVNULL)
        output.seek(0)
        lines = [line for line in output if line.startswith("{")]
    if cost.status or not lines:
        raise SystemExit(f"{argv} failed")
    report = json.loads(lines[-1])
    return Measurement(
        cost.seconds,
        path.stat().st_size,
        report["stopped_seconds"],
        cost.peak_rss,
        cost.cpu_seconds,
        memory_of(machine.pid) - before,
    )


def by_cli(*words: str) -> Dump:
    """Dump by QMP."""
    return lambda machine, path: our_dump(
        machine, cli_argv("--qmp", machine.qmp_sockets[0], "--json", *words, path), path
    )


def by_gdb(*words: str) -> Dump:
    """Dump inside gdb, by the stub alone."""

    def run(machine: QemuMachine, path: Path) -> Measurement:
        command = " ".join(["qemu-dump-guest-memory --json", *words, str(path)])
        session = [f"target remote {machine.gdb_socket}", f"source {GDB_SCRIPT}", command]
        return our_dump(machine, gdb_argv([*session, "disconnect"]), path)

    return run


def by_gdbs_own(machine: QemuMachine, path: Path) -> Measurement:
    """Dump a range with gdb's own command, in the physical memory mode of the stub."""
    session = [
        f"target remote {machine.gdb_socket}",
        "maintenance packet Qqemu.PhyMemMode:1",
        f"dump binary memory {path} 0 {_STUB_RANGE:#x}",
        'echo {"stopped_seconds": 0}\\n',
        "maintenance packet Qqemu.PhyMemMode:0",
        "disconnect",
    ]
    return our_dump(machine, gdb_argv(session), path)


_STUB_RANGE = 64 * MIB
_ALL_PAGES, _KERNEL_PAGES, _MINI = ("-z",), ("-z", "--dump-level", "31!"), ("-z", "--mini")
CASES: Sequence[Case] = (
    Case("elf", by_qemu("elf"), by_cli()),
    Case("elf --exact", by_qemu("elf"), by_cli("--exact")),
    Case("elf -p", by_qemu("elf", paging=True), by_cli("-p")),
    Case("elf -p --exact", by_qemu("elf", paging=True), by_cli("-p", "--exact")),
    Case("kdump-zlib", by_qemu("kdump-zlib"), by_cli(*_ALL_PAGES)),
    Case("kdump-zlib --level 0", by_qemu("kdump-zlib"), by_cli("-z", "--level", "0")),
    Case("kdump-zlib --snapshot", by_qemu("kdump-zlib"), by_cli("-z", "--snapshot")),
    Case("kdump-zlib --exact", by_qemu("kdump-zlib"), by_cli("-z", "--exact")),
    Case("kdump-raw-zlib", by_qemu("kdump-zlib"), by_cli("-z", "-R")),
    Case("kdump-lzo", by_qemu("kdump-zlib"), by_cli("-l")),
    Case("kdump-snappy", by_qemu("kdump-zlib"), by_cli("-s")),
    Case("kdump-zstd", by_qemu("kdump-zlib"), by_cli("-z", "zstd")),
    Case("kdump-zlib --dump-level 31", by_qemu("kdump-zlib"), by_cli(*_KERNEL_PAGES)),
    Case("kdump-zlib --mini", by_qemu("kdump-zlib"), by_cli(*_MINI)),
    Case(
        "kdump-zlib --dump-level 31, against QEMU's elf and makedumpfile -c -d 31",
        by_makedumpfile,
        by_cli(*_KERNEL_PAGES),
    ),
    Case("kdump-zlib in gdb", by_qemu("kdump-zlib"), by_gdb("-z")),
    Case("elf in gdb", by_qemu("elf"), by_gdb()),
    Case(
        "kdump-zlib by native_stream",
        by_qemu("kdump-zlib"),
        by_cli("-z", "--memory", "native_stream"),
    ),
    Case("kdump-zlib by pmemsave", by_qemu("kdump-zlib"), by_cli("-z", "--memory", "pmemsave")),
    Case(
        "64 MiB by gdbstub, against gdb's dump binary memory",
        by_gdbs_own,
        by_gdb("--memory", "gdbstub", "--no-vmcoreinfo", "--range", "0", f"{_STUB_RANGE:#x}"),
    ),
    # The last, for it leaves another guest behind.
    Case("kdump-zlib --live", by_qemu("kdump-zlib"), by_cli("-z", "--live"), runs=True),
)
SPARSE_CASES: Sequence[Case] = (
    Case("kdump-zlib", by_qemu("kdump-zlib"), by_cli(*_ALL_PAGES)),
    Case("kdump-zlib --level 0", by_qemu("kdump-zlib"), by_cli("-z", "--level", "0")),
    Case("kdump-zlib --omit-zero", by_qemu("kdump-zlib"), by_cli("-z", "--omit-zero")),
)
SMALL_CASES: Sequence[Case] = (
    Case("elf", by_qemu("elf"), by_cli()),
    Case("kdump-zlib", by_qemu("kdump-zlib"), by_cli(*_ALL_PAGES)),
)


@dataclass(frozen=True)
class Row:
    """Medians of one case and of QEMU's own dump, taken in turn."""

    name: str
    native: Measurement
    ours: Measurement


def median_of(measurements: Sequence[Measurement]) -> Measurement:
    """Return the median of each number."""
    columns = zip(*(asdict(m).values() for m in measurements), strict=True)
    seconds, size, stopped, rss, cpu, growth = (statistics.median(column) for column in columns)
    return Measurement(seconds, int(size), stopped, int(rss), cpu, int(growth))


def measure(case: Case, machine: QemuMachine, rounds: int, directory: Path) -> Row:
    """Take both dumps in turn, `rounds` times."""
    native: list[Measurement] = []
    ours: list[Measurement] = []
    path = directory / "dump"
    with running(machine) if case.runs else nullcontext():
        case.run(machine, path)  # compiles, and is not counted
        path.unlink()
        for _ in range(rounds):
            # Ours first: QEMU's own dump leaves page tables for all of its memory behind.
            ours.append(case.run(machine, path))
            path.unlink()
            native.append(case.native(machine, path))
            path.unlink()
    return Row(case.name, median_of(native), median_of(ours))


@contextmanager
def running(machine: QemuMachine) -> Iterator[None]:
    """Let the guest run inside the block."""
    with RawQmp(machine.qmp_sockets[1]) as qmp:
        qmp.execute("cont")
    try:
        yield
    finally:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("stop")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Write rows in Markdown."""
    yield (
        "| dump | QEMU's own | ours | faster | CPU time | QEMU's/ours | file, ours/QEMU's"
        " | guest pause | peak memory | QEMU grew: by its own | by ours |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        native, ours = row.native, row.ours
        yield (
            f"| {row.name} | {native.seconds:.2f} s | {ours.seconds:.2f} s"
            f" | {native.seconds / ours.seconds:.1f} x | {ours.cpu_seconds:.2f} s"
            f" | {native.cpu_seconds / max(ours.cpu_seconds, 0.01):.1f}"
            f" | {ours.size / native.size:.2f} | {ours.stopped_seconds:.3f} s"
            f" | {ours.peak_rss / MIB:.0f} MiB | {native.growth / MIB:.0f} MiB"
            f" | {ours.growth / MIB:.0f} MiB |"
        )


def limits(machine: QemuMachine, directory: Path) -> dict[str, float]:
    """Return the seconds that the parts of a dump take where nothing else is done.

    Returns:
        Of a dump of one page; of the disk, for all memory with content; of each codec, for it.
    """
    path = directory / "part"
    seconds = {
        "a dump of one page": by_cli("--no-vmcoreinfo", "--range", "0", "4096")(
            machine, path
        ).seconds
    }
    path.unlink()
    seconds["telling pages of level 31 apart, for each GiB"] = _pages_alone(machine)
    seconds["the reading thread, for each GiB with content"] = _reading_alone(machine)
    by_cli("--no-vmcoreinfo")(machine, path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        first = len(content) % 4096  # headers stand before whole pages
        starts = range(first, len(content) - PIECE_SIZE + 1, PIECE_SIZE)
        pieces = [content[start : start + PIECE_SIZE] for start in starts]
    path.unlink()
    pieces = [piece for piece in pieces if piece.strip(b"\0")]
    name = f"writing {len(pieces) * PIECE_SIZE // MIB} MiB to the disk"
    seconds[name] = _disk_alone(path, pieces)
    return seconds | _codecs_alone(pieces)


def _pages_alone(machine: QemuMachine) -> float:
    with (
        connect_qmp(str(machine.qmp_sockets[0])) as qmp,
        engine.stopped_guest(GuestAccess.by_qmp(qmp), "process") as guest,
    ):
        vmcoreinfo = guest.find_vmcoreinfo()
        started = time.perf_counter()
        guest.kernel_pages(vmcoreinfo).excluded(FilterRules(31))
        seconds = time.perf_counter() - started
        return seconds / sum(block.size for block in guest.ram_blocks) * (1 << 30)


def read_from_guest(machine: QemuMachine, path: Path, *words: str) -> int:
    """Return how many bytes a dump reads from the guest's memory."""
    sizes: list[int] = []
    read_some = ProcessMemory._read_some

    def counted(memory: ProcessMemory, hva: int, buffer: memoryview) -> int:
        sizes.append(read_some(memory, hva, buffer))
        return sizes[-1]

    argv = ["--qmp", str(machine.qmp_sockets[0]), "--memory", "process", *words, str(path)]
    with patch.object(ProcessMemory, "_read_some", counted):
        if dump_main(argv):
            raise SystemExit(f"{argv} failed")
    path.unlink()
    return sum(sizes)


def _reading_alone(machine: QemuMachine) -> float:
    """Return the CPU time of the thread that reads, and finds equal pages; nothing is packed."""
    with (
        connect_qmp(str(machine.qmp_sockets[0])) as qmp,
        engine.stopped_guest(GuestAccess.by_qmp(qmp), "process") as guest,
    ):
        memory, blocks = guest.memory, guest.ram_blocks
        count = sum(block.size for block in blocks) // 4096
        pages = deduplicator(memory, blocks, 4096, count)
        pieces = [
            piece for block in blocks for piece in cut(memory, [block], block.gpa, block.end, 4096)
        ]

        def prepare(piece: Piece, buffer: Buffer) -> None:
            if pages is not None:
                pages.take_out(piece, buffer)

        def rest(_piece: Piece, _buffer: Buffer) -> None:
            time.sleep(_PACKING_SECONDS)

        work = PieceWork(rest, lambda _: None, lambda _: None, prepare)
        # Shared, as with the processes that pack.
        count = buffer_count(_MANY_WORKERS)
        buffers = [Buffer(memoryview(mmap.mmap(-1, PIECE_SIZE))) for _ in range(count)]
        started = time.thread_time()
        read_through(memory, pieces, work, lambda _: None, threads=_MANY_WORKERS, buffers=buffers)
        seconds = time.thread_time() - started
        return seconds / sum(piece.size for piece in pieces if piece.extents) * (1 << 30)


def _disk_alone(path: Path, pieces: Sequence[bytes]) -> float:
    area = private_memory(PIECE_SIZE)
    started = time.perf_counter()
    with path.open("wb") as file:
        writer = FileWriter(file.fileno())
        for number, piece in enumerate(pieces):
            area[:] = piece
            writer.write_at(number * PIECE_SIZE, area)
        writer.finish()
        writer.close()
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def _codecs_alone(pieces: Sequence[bytes]) -> dict[str, float]:
    choices = [Compression(name) for name in all_page_codecs()]
    choices += [Compression("zlib", level=0), Compression("zlib", exact=True)]
    seconds = {}
    for choice in choices:
        with PackingProcesses(choice, worker_count()) as packer:
            for buffer in packer.buffers:
                packer.pack(buffer, _PAGE)  # has come up
            free = queue.SimpleQueue[Buffer]()
            for buffer in packer.buffers:
                free.put(buffer)
            pack = partial(_pack_piece, packer, free)
            started = time.perf_counter()
            with ThreadPoolExecutor(worker_count()) as pool:
                list(pool.map(pack, pieces))
            words = [choice.codec, choice.level, "exact" if choice.exact else None]
            name = " ".join(str(word) for word in words if word is not None)
            seconds[f"{name} on all CPUs"] = time.perf_counter() - started
    return seconds


def _pack_piece(packer: PackingProcesses, free: queue.SimpleQueue[Buffer], content: bytes) -> None:
    buffer = free.get()
    buffer.view[:] = content
    packer.pack(buffer, _PAGE)
    free.put(buffer)


@contextmanager
def stopped_guest(memory_mib: int, fill_mib: int) -> Iterator[BootedGuest]:
    """Boot a guest, fill its memory with file content, and stop it."""
    image = find_image("x86_64")
    store = ImageStore(default_cache())
    with BootedGuest(
        image,
        store.fetch(image),
        memory_mib=memory_mib,
        fill_mib=fill_mib,
        fill_disk=store.fill_disk(fill_mib),
    ) as guest:
        with RawQmp(guest.qmp_sockets[1]) as qmp:
            qmp.execute("stop")
        yield guest


@contextmanager
def sparse_guest(memory_mib: int, fill_mib: int) -> Iterator[QemuMachine]:
    """Start a machine whose memory has file content at its beginning and was not touched behind."""
    content = ImageStore(default_cache()).fill_disk(fill_mib)
    with tempfile.NamedTemporaryFile() as part:
        with content.open("rb") as source:
            for _ in range(fill_mib):
                part.write(source.read(MIB))
        part.flush()
        loader = f"loader,file={part.name},addr={4 * MIB:#x},force-raw=on"
        # Without reserve=off the kernel refuses more than it has.
        backend = f"memory-backend-ram,id=ram,size={memory_mib}M,reserve=off"
        arguments = ["-M", "q35,memory-backend=ram", "-m", str(memory_mib), "-object", backend]
        arguments += ["-device", loader]
        with stopped_machine(["qemu-system-x86_64"], arguments) as machine:
            yield machine


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--memory", type=int, metavar="MIB", help="2048; 65536 with --sparse, 64 with --small"
    )
    parser.add_argument(
        "--fill", type=int, metavar="MIB", help="850; 300 with --sparse; 0: as booted"
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--sparse", action="store_true")
    kinds.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", help="cases whose name contains this")
    parser.add_argument("--limits", action="store_true", help="measure the parts alone as well")
    parser.add_argument("--directory", type=Path, help="where the dumps are written")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kind = next(name for name in ("sparse", "small", "") if not name or vars(arguments)[name])
    cases = {"sparse": SPARSE_CASES, "small": SMALL_CASES, "": CASES}[kind]
    memory = arguments.memory or {"sparse": 65536, "small": 64, "": 2048}[kind]
    fill = (300 if arguments.sparse else 850) if arguments.fill is None else arguments.fill
    started: AbstractContextManager[QemuMachine]
    if kind == "small":
        started = stopped_machine(["qemu-system-x86_64"], ["-m", str(memory)])
    else:
        started = sparse_guest(memory, fill) if arguments.sparse else stopped_guest(memory, fill)
    with (
        started as guest,
        tempfile.TemporaryDirectory(dir=arguments.directory) as directory,
    ):
        rows = []
        for case in cases:
            if any(word in case.name for word in arguments.only or ("",)):
                print(case.name, file=sys.stderr)
                rows.append(measure(case, guest, arguments.rounds, Path(directory)))
        alone = limits(guest, Path(directory)) if arguments.limits else {}
        read = {
            " ".join(words): read_from_guest(guest, Path(directory) / "part", *words)
            for words in (_ALL_PAGES, _KERNEL_PAGES, _MINI)
            if arguments.limits
        }
    if arguments.json:
        print(json.dumps({"dumps": [asdict(row) for row in rows], "alone": alone, "read": read}))
    else:
        print("\n".join(table(rows)))
        for part, seconds in alone.items():
            print(f"{part} alone: {seconds:.2f} s")
        for words, size in read.items():
            print(f"read from the guest by {words}: {size / MIB:.0f} MiB")


if __name__ == "__main__":
    main()
