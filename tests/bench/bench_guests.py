"""Take the time of listing the guests of a host.

    .venv/bin/python tests/bench/bench_guests.py [--rounds N] [COUNT ...]

Starts so many QEMUs (default: 15, and 50) without a machine, each with two QMP sockets and a human
monitor, and runs `qemu-dump guests --json` while they are there. Prints a table in Markdown:
medians of the wall time of the program, and of its CPU time; both with the start of Python.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_QEMU = ("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S")
_PROGRAM = "import sys; from qemu_dump_ext.entry import qemu_dump as run; sys.exit(run())"
_POLL_SECONDS = 0.01


@contextmanager
def _running(count: int, folder: Path) -> Iterator[set[int]]:
    """Run QEMUs until the block ends; yields their PIDs once they listen."""
    processes = []
    try:
        for number in range(count):
            paths = [folder / f"{count}-{number}-{kind}" for kind in ("qmp", "hmp", "qmp2")]
            ends = [f"unix:{path},server=on,wait=off" for path in paths]
            words = ["-name", f"bench-{number}", "-qmp", ends[0], "-monitor", ends[1]]
            processes.append(subprocess.Popen([*_QEMU, *words, "-qmp", ends[2]]))
        while len(list(folder.glob(f"{count}-*"))) < 3 * count:
            if any(process.poll() is not None for process in processes):
                raise SystemExit("a QEMU has ended")
            time.sleep(_POLL_SECONDS)
        yield {process.pid for process in processes}
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _listed(pids: set[int]) -> tuple[float, float]:
    """Return wall and CPU seconds of listing guests, among which these are."""
    words = [sys.executable, "-c", _PROGRAM, "guests", "--json"]
    started, before = time.monotonic(), os.times()
    done = subprocess.run(words, capture_output=True, check=True)
    wall, after = time.monotonic() - started, os.times()
    found = {guest["pid"]: guest for guest in json.loads(done.stdout)}
    assert pids <= found.keys()
    assert all(len(found[pid]["ways"]) == 3 for pid in pids)
    cpu = after.children_user - before.children_user
    return wall, cpu + after.children_system - before.children_system


def _row(count: int, rounds: int, folder: Path) -> str:
    with _running(count, folder) as pids:
        taken: Sequence[tuple[float, float]] = [_listed(pids) for _ in range(rounds)]
    wall, cpu = (statistics.median(times) for times in zip(*taken, strict=True))
    return f"| {count} | {wall:.2f} s | {cpu:.2f} s |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", nargs="*", type=int, default=[15, 50], metavar="COUNT")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("| guests | `qemu-dump guests`, wall | CPU |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for count in arguments.counts:
            print(_row(count, arguments.rounds, Path(name)), flush=True)


if __name__ == "__main__":
    main()
