"""Measure live dumps: how long the guest stands still, how slow it is meanwhile, and what it takes.

    .venv/bin/python -m tests.bench.bench_live [--memory MIB] [--fill MIB] [--rounds N] [--newer]

A guest of a few instructions writes memory all the time; most of its memory is filled with content
that does not pack. Prints a table in Markdown: medians, one row for each memory backend; the whole
dump is taken once, without the search for VMCOREINFO, which such a guest has not. The last
row is that of the copy in a file, as it is where memory is short; the first rows are `--snapshot`
and QEMU's own dump.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.engine.live_guest import live_guest
from qemu_dump_ext.errors import NotLiveError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.pages import _copy_store as copy_store
from qemu_dump_ext.qemu.qmp import connect_qmp
from tests.support.bare_guests import COUNTING, counting_arguments
from tests.support.doors import child_environment, cli_argv
from tests.support.newer_qemu import newer_qemu_command
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

_MIB = 1 << 20
_FILL_AT = 64 * _MIB
_GUEST = COUNTING["x86_64"]
_BACKENDS = {
    "none: private RAM": "",
    "ram": "memory-backend-ram",
    "memfd, share=on": "memory-backend-memfd,share=on",
    "memfd, share=off": "memory-backend-memfd,share=off",
    "file, share=on": "memory-backend-file,mem-path={path},share=on",
    "file, share=off": "memory-backend-file,mem-path={path},share=off",
}


@contextmanager
def guest(
    folder: Path, backend: str, memory: int, content: Path | None, *, newer: bool
) -> Iterator[QemuMachine]:
    """Yield a guest that writes memory all the time."""
    command = newer_qemu_command() if newer else ["qemu-system-x86_64"]
    arguments = [*counting_arguments("x86_64", folder, 1), "-m", str(memory)]
    if content is not None:
        arguments += ["-device", f"loader,file={content},addr={_FILL_AT},force-raw=on"]
    if backend:
        what = f"{backend.format(path=folder / 'ram')},id=m,size={memory}M"
        arguments += ["-object", what, "-machine", "memory-backend=m"]
    with QemuMachine(command, arguments) as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            wait_until(lambda: counter_of(qmp) > 1 << 20)
        yield machine
    (folder / "ram").unlink(missing_ok=True)


def counter_of(qmp: RawQmp) -> int:
    """Return how many numbers the guest has drawn."""
    line = {"command-line": f"xp /1xw {_GUEST.counter:#x}"}
    return int(qmp.execute("human-monitor-command", **line).split()[-1], 16)


def rate_of(qmp: RawQmp, seconds: float) -> float:
    """Return how many numbers it draws in a second."""
    begun, before = time.monotonic(), counter_of(qmp)
    time.sleep(seconds)
    return (counter_of(qmp) - before) / (time.monotonic() - begun)


def by_stream(machine: QemuMachine, folder: Path, rounds: int) -> str:
    """Return the cells of one backend."""
    pauses, protected, slowed = [], [], []
    with (
        connect_qmp(str(machine.qmp_sockets[0])) as monitor,
        RawQmp(machine.qmp_sockets[1]) as qmp,
    ):
        for _ in range(rounds):
            usual = rate_of(qmp, 0.5)
            begun, before = time.monotonic(), counter_of(qmp)
            try:
                with live_guest(GuestAccess.by_qmp(monitor), folder) as live:
                    during = (counter_of(qmp) - before) / (time.monotonic() - begun)
                    pauses.append(live.pause.seconds())
                    protected.append(live.protected_seconds)
                    slowed.append(1 - during / usual)
            except NotLiveError as error:
                return f"refused: {error.message} | | | | "
    middle = statistics.median
    whole, peak = by_command(machine, folder, "--live", 1)
    return (
        f"{1e3 * middle(pauses):.1f} ms | {middle(protected):.2f} s | {100 * middle(slowed):.0f} %"
        f" | {whole:.2f} s | {peak >> 20} MiB"
    )


def by_command(machine: QemuMachine, folder: Path, option: str, rounds: int) -> tuple[float, int]:
    """Return the time of the whole command, an ELF core, and its peak of memory."""
    taken, peak = [], 0
    for _ in range(rounds):
        words = cli_argv(
            *("--qmp", machine.qmp_sockets[0], option, "--no-vmcoreinfo", "--json", "--force"),
            folder / "x",
        )
        begun = time.monotonic()
        process = subprocess.Popen(words, env=child_environment(), stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert not status
        taken.append(time.monotonic() - begun)
        peak = max(peak, usage.ru_maxrss * 1024)
    (folder / "x").unlink()
    return statistics.median(taken), peak


def row_of_pause(machine: QemuMachine, folder: Path, rounds: int) -> Iterator[str]:
    """Yield the rows of what stops the guest for the whole dump, or for the copy."""
    pauses, taken = [], []
    for _ in range(rounds):
        words = cli_argv(
            *("--qmp", machine.qmp_sockets[0], "--snapshot", "--no-vmcoreinfo", "--json"),
            folder / "x",
        )
        begun = time.monotonic()
        done = subprocess.run(words, env=child_environment(), capture_output=True, check=True)
        taken.append(time.monotonic() - begun)
        pauses.append(json.loads(done.stdout)["stopped_seconds"])
        (folder / "x").unlink()
    pause, whole = statistics.median(pauses), statistics.median(taken)
    yield f"| `--snapshot` | {1e3 * pause:.0f} ms | | | {whole:.2f} s | |"
    with RawQmp(machine.qmp_sockets[1], timeout_seconds=600) as qmp:
        begun = time.monotonic()
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{folder / 'x'}")
        whole = time.monotonic() - begun
    (folder / "x").unlink()
    yield f"| QEMU's own dump | {1e3 * whole:.0f} ms | | | {whole:.2f} s | |"


def spooled(address: str, folder: Path) -> None:
    """Take a live dump whose copy is in a file; print the peak of memory."""
    copy_store.available_memory = lambda: 0
    with (
        connect_qmp(address) as monitor,
        live_guest(GuestAccess.by_qmp(monitor), folder) as live,
    ):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps([live.pause.seconds(), live.protected_seconds, peak]))


def row_of_file(machine: QemuMachine, folder: Path) -> str:
    """Return the row of a copy in a file."""
    words = [sys.executable, "-m", "tests.bench.bench_live", "--spool"]
    done = subprocess.run(
        [*words, str(machine.qmp_sockets[0]), str(folder)],
        env=child_environment(),
        capture_output=True,
        check=True,
    )
    pause, protected, peak = json.loads(done.stdout)
    return (
        f"| the copy in a file | {1e3 * pause:.1f} ms | {protected:.2f} s | | | {peak >> 20} MiB |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--memory", type=int, default=2048, metavar="MIB")
    parser.add_argument("--fill", type=int, default=900, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--newer", action="store_true", help="a newer QEMU than the machine's")
    parser.add_argument("--only", default="", help="backends whose names begin so")
    parser.add_argument("--spool", nargs=2, metavar=("SOCKET", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.spool:
        spooled(given.spool[0], Path(given.spool[1]))
        return
    print("| memory backend | pause | slow to write | slower by | whole dump | peak memory |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder, content = Path(name), None
        if given.fill:
            content = folder / "content"
            content.write_bytes(os.urandom(_MIB) * given.fill)
        for label, backend in _BACKENDS.items():
            if not label.startswith(given.only):
                continue
            rounds = given.rounds if not backend else min(given.rounds, 2)
            with guest(folder, backend, given.memory, content, newer=given.newer) as machine:
                print(f"| {label} | {by_stream(machine, folder, rounds)} |", flush=True)
                if not backend:
                    print(row_of_file(machine, folder), flush=True)
                    for row in row_of_pause(machine, folder, 1):
                        print(row, flush=True)


if __name__ == "__main__":
    main()
