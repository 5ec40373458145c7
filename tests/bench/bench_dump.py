"""Measure our dumps against QEMU's own, in turn, on one stopped Linux guest with real content.

    .venv/bin/python -m tests.bench.bench_dump [--memory MIB] [--fill MIB] [--rounds N] [--json]

Prints a table in Markdown: medians, and ratios in which more than 1 means that ours is better.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from qemu_dump_ext.guest_images.machine import BootedGuest, QemuMachine
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from tests.support.doors import GDB_SCRIPT, child_environment, cli_argv, gdb_argv
from tests.support.raw_qmp import RawQmp

MIB = 1 << 20


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


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        name: Of the row.
        native_format: QEMU's dump that it is compared with.
        run: Takes our dump into a file.
        paging: Of QEMU's dump.
    """

    name: str
    native_format: str
    run: Callable[[QemuMachine, Path], Measurement]
    paging: bool = False


def native_dump(machine: QemuMachine, case: Case, path: Path) -> Measurement:
    """Let QEMU dump; the guest stands still meanwhile."""
    with RawQmp(machine.qmp_sockets[1], timeout_seconds=600) as qmp:
        before, used = memory_of(machine.pid), cpu_seconds_of(machine.pid)
        started = time.perf_counter()
        qmp.execute(
            "dump-guest-memory",
            paging=case.paging,
            protocol=f"file:{path}",
            format=case.native_format,
        )
        seconds = time.perf_counter() - started
    used = cpu_seconds_of(machine.pid) - used
    growth = memory_of(machine.pid) - before
    return Measurement(seconds, path.stat().st_size, seconds, 0, used, growth)


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
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        environment = child_environment()
        if argv[0] == "gdb":
            del environment["PYTHONPATH"]
        process = subprocess.Popen(
            argv, stdout=output, env=environment, stdin=subprocess.DEVNULL, stderr=sys.stderr
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        output.seek(0)
        lines = [line for line in output if line.startswith("{")]
    if status or not lines:
        raise SystemExit(f"{argv} failed")
    report = json.loads(lines[-1])
    return Measurement(
        seconds,
        path.stat().st_size,
        report["stopped_seconds"],
        usage.ru_maxrss * 1024,
        usage.ru_utime + usage.ru_stime,
        memory_of(machine.pid) - before,
    )


def by_cli(*words: str) -> Callable[[QemuMachine, Path], Measurement]:
    """Dump by QMP."""
    return lambda machine, path: our_dump(
        machine, cli_argv("--qmp", machine.qmp_sockets[0], "--json", *words, path), path
    )


def by_gdb(*words: str) -> Callable[[QemuMachine, Path], Measurement]:
    """Dump inside gdb, by the stub alone."""

    def run(machine: QemuMachine, path: Path) -> Measurement:
        command = " ".join(["qemu-dump-guest-memory --json", *words, str(path)])
        session = [f"target remote {machine.gdb_socket}", f"source {GDB_SCRIPT}", command]
        return our_dump(machine, gdb_argv([*session, "disconnect"]), path)

    return run


CASES = (
    Case("elf", "elf", by_cli()),
    Case("elf --exact", "elf", by_cli("--exact")),
    Case("elf -p", "elf", by_cli("-p"), paging=True),
    Case("elf -p --exact", "elf", by_cli("-p", "--exact"), paging=True),
    Case("kdump-zlib", "kdump-zlib", by_cli("-z")),
    Case("kdump-zlib --level 0", "kdump-zlib", by_cli("-z", "--level", "0")),
    Case("kdump-zlib --snapshot", "kdump-zlib", by_cli("-z", "--snapshot")),
    Case("kdump-zlib --exact", "kdump-zlib", by_cli("-z", "--exact")),
    Case("kdump-raw-zlib", "kdump-zlib", by_cli("-z", "-R")),
    Case("kdump-lzo", "kdump-zlib", by_cli("-l")),
    Case("kdump-snappy", "kdump-zlib", by_cli("-s")),
    Case("kdump-zstd", "kdump-zlib", by_cli("-z", "zstd")),
    Case("kdump-zlib in gdb", "kdump-zlib", by_gdb("-z")),
    Case("elf in gdb", "elf", by_gdb()),
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
    for _ in range(rounds):
        path = directory / "dump"
        # Ours first: QEMU's own dump leaves page tables for all of its memory behind.
        ours.append(case.run(machine, path))
        path.unlink()
        native.append(native_dump(machine, case, path))
        path.unlink()
    return Row(case.name, median_of(native), median_of(ours))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Write rows in Markdown."""
    yield (
        "| dump | QEMU's own | ours | faster | CPU time, QEMU's/ours | file, ours/QEMU's"
        " | guest pause | peak memory | QEMU grew |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        native, ours = row.native, row.ours
        yield (
            f"| {row.name} | {native.seconds:.2f} s | {ours.seconds:.2f} s"
            f" | {native.seconds / ours.seconds:.1f} x"
            f" | {native.cpu_seconds / max(ours.cpu_seconds, 0.01):.1f}"
            f" | {ours.size / native.size:.2f} | {ours.stopped_seconds:.2f} s"
            f" | {ours.peak_rss / MIB:.0f} MiB | {ours.growth / MIB:.0f} MiB |"
        )


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--memory", type=int, default=2048, metavar="MIB")
    parser.add_argument("--fill", type=int, default=850, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--directory", type=Path, help="where the dumps are written")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with (
        stopped_guest(arguments.memory, arguments.fill) as guest,
        tempfile.TemporaryDirectory(dir=arguments.directory) as directory,
    ):
        rows = []
        for case in CASES:
            if arguments.only in case.name:
                print(case.name, file=sys.stderr)
                rows.append(measure(case, guest, arguments.rounds, Path(directory)))
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
