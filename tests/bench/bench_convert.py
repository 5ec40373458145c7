"""Take the time of conversions of one dump, beside that of dumping the same memory.

    .venv/bin/python -m tests.bench.bench_convert DUMP [--rounds N]

Makes an ELF core and a kdump of the dump first, and a machine that stands still and has its memory;
and then, of each, what a row names, in a process of its own, all rows in turn. Prints a table in
Markdown: the shortest time, seconds of CPU, how these compare with the dump from memory in the same
format (more than 1: slower), and the most memory that the process had.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.guest_images.machine import stopped_machine
from tests.support.measured import Cost, run_measured

_MEMORY = "memory"
_ROWS = (
    (_MEMORY, "elf"),
    (_MEMORY, "kdump-raw-zlib"),
    (_MEMORY, "kdump-raw-zstd"),
    ("elf", "elf"),
    ("elf", "kdump-raw-zlib"),
    ("kdump-raw-zlib", "kdump-raw-zlib"),
    ("kdump-raw-zlib", "kdump-raw-zstd"),
    ("kdump-raw-zlib", "elf"),
)
_SAME = ("--force", "--no-vmcoreinfo")
"""Of every row; none spends time on a search of memory that others need not make."""
_HOLE = 2 << 30
"""Where a q35 has no RAM but above 4 GiB."""


_MAIN = "from qemu_dump_ext.cli import main; raise SystemExit(main())"


def run(*words: object) -> Cost:
    """Have `qemu-dump` do something."""
    with tempfile.TemporaryFile("w+") as told:
        cost = run_measured([sys.executable, "-c", _MAIN, *words], stderr=told)
        if cost.status not in {0, 6}:
            told.seek(0)
            raise SystemExit(told.read())
    return cost


@contextmanager
def machine_with_memory_of(path: Path, folder: Path) -> Iterator[Path]:
    """Yield the QMP socket of a machine that stands still and has the memory of a dump."""
    end = 1 << 20
    with open_dump(path) as dump, (folder / "ram").open("wb") as file:
        for gpa, size in dump.readable_ranges():
            for at in range(gpa, min(gpa + size, _HOLE), 1 << 20):
                end = min(at + (1 << 20), gpa + size)
                file.seek(at)
                file.write(dump.read(at, end - at))
        size = -(-end // (1 << 20)) << 20
        file.truncate(size)
    # As other guests' memory, that of this one is its process's, and not a file's.
    backend = f"memory-backend-file,id=ram,mem-path={folder / 'ram'},share=off,prealloc=on"
    words = ("-object", f"{backend},size={size}", "-M", "q35,memory-backend=ram")
    with stopped_machine(["qemu-system-x86_64"], (*words, "-m", f"{size >> 20}")) as machine:
        yield machine.qmp_sockets[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dump", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    costs = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=arguments.dump.parent) as name:
        folder = Path(name)
        for source in {source for source, _ in _ROWS} - {_MEMORY}:
            run("convert", arguments.dump, folder / source, "--format", source)
        with machine_with_memory_of(arguments.dump, folder) as qmp:
            for _ in range(arguments.rounds):
                for source, target in _ROWS:
                    words = (folder / "out", "--format", target, *_SAME)
                    if source == _MEMORY:
                        costs[source, target].append(run("dump", "--qmp", qmp, *words))
                    else:
                        costs[source, target].append(run("convert", folder / source, *words))
    print("| from | to | seconds | times memory | CPU seconds | times memory | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for source, target in _ROWS:
        seconds, cpu, peak = _best(costs[source, target])
        of_memory = _best(costs[_MEMORY, target])
        print(
            f"| {source} | {target} | {seconds:.1f} | {seconds / of_memory[0]:.2f} | {cpu:.1f}"
            f" | {cpu / of_memory[1]:.2f} | {peak} |"
        )


def _best(costs: list[Cost]) -> tuple[float, float, int]:
    return (
        min(cost.seconds for cost in costs),
        min(cost.cpu_seconds for cost in costs),
        max(cost.peak_rss for cost in costs) >> 20,
    )


if __name__ == "__main__":
    main()
