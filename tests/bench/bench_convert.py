"""Take the time of conversions of one dump, beside that of reading it.

    .venv/bin/python tests/bench/bench_convert.py DUMP [--rounds N]

Makes an ELF core and a kdump of the dump first, and then, of each, what a row names, in a process
of its own. Prints a table in Markdown: the shortest time, MiB of guest memory in a second, seconds
of CPU, and the most memory that the process and what it starts had.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from qemu_dump_ext.dump_readers import open_dump

_ROWS = (
    ("elf", "elf"),
    ("elf", "kdump-raw-zlib"),
    ("elf", "kdump-raw-none"),
    ("kdump-raw-zlib", "kdump-raw-zlib"),
    ("kdump-raw-zlib", "kdump-raw-zstd"),
    ("kdump-raw-zlib", "elf"),
)


@dataclass(frozen=True)
class Cost:
    """What one conversion took: seconds, seconds of CPU, KiB of memory at most."""

    seconds: float
    cpu_seconds: float
    peak_kib: int


def convert(source: Path, target: Path, dump_format: str) -> Cost:
    """Run one conversion."""
    words = ("convert", source, target, "--force", "--format", dump_format)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", "from qemu_dump_ext.cli import main; raise SystemExit(main())"]
        + [str(word) for word in words],
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        told = process.stderr.read() if process.stderr else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in {0, 6}:
        raise SystemExit(told)
    seconds = time.monotonic() - started
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dump", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with open_dump(arguments.dump) as dump:
        mib = sum(size for _, size in dump.readable_ranges()) / (1 << 20)
    print("| from | to | seconds | MiB/s | CPU seconds | peak MiB |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.dump.parent) as folder:
        for source in sorted({source for source, _ in _ROWS}):
            convert(arguments.dump, Path(folder) / source, source)
        for source, target in _ROWS:
            costs = [
                convert(Path(folder) / source, Path(folder) / "out", target)
                for _ in range(arguments.rounds)
            ]
            best = min(costs, key=lambda cost: cost.seconds)
            cpu = min(cost.cpu_seconds for cost in costs)
            peak = max(cost.peak_kib for cost in costs) >> 10
            print(
                f"| {source} | {target} | {best.seconds:.1f} | {mib / best.seconds:.0f}"
                f" | {cpu:.1f} | {peak} |"
            )


if __name__ == "__main__":
    main()
