"""Measure live dumps: how long the guest stands still, how slow it is meanwhile, and what it takes.

    .venv/bin/python -m tests.bench.bench_live [--memory MIB] [--fill MIB] [--rounds N] [--newer]

A guest of a few instructions writes memory all the time; most of its memory is filled with content
that does not pack. Prints a table in Markdown: medians, one row for each memory backend, a guest of
its own for each round. "Again" is the pause of a second live dump of the same guest: the first one
has made small pages of its huge ones, which take longer to protect. The whole dump is taken once,
without the search for VMCOREINFO, which such a guest has not. A row is that of the copy in a file,
as it is where memory is short; others are `--snapshot` and QEMU's own dump.
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
from dataclasses import dataclass
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
from tests.support.processes import Process
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

_MIB = 1 << 20
_FILL_AT = 64 * _MIB
_GUEST = COUNTING["x86_64"]
_BACKENDS = {
    "none: private RAM": "",
    "ram": "memory-backend-ram,reserve=off",
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


@dataclass(frozen=True)
class Taken:
    """One live dump: the pause and what follows in seconds, the slow-down as a part of one."""

    pause: float
    protected: float
    slower: float


def take(machine: QemuMachine, folder: Path) -> Taken:
    """Take a guest live, and nothing more."""
    with (
        connect_qmp(str(machine.qmp_sockets[0])) as monitor,
        RawQmp(machine.qmp_sockets[1]) as qmp,
    ):
        usual = rate_of(qmp, 0.5)
        begun, before = time.monotonic(), counter_of(qmp)
        with live_guest(GuestAccess.by_qmp(monitor), folder) as live:
            during = (counter_of(qmp) - before) / (time.monotonic() - begun)
            return Taken(live.pause.seconds(), live.protected_seconds, 1 - during / usual)


def by_stream(
    folder: Path, backend: str, given: argparse.Namespace, content: Path | None
) -> Iterator[str]:
    """Yield the rows of one backend, without their names."""
    first: list[Taken] = []
    again: list[Taken] = []
    others: list[str] = []
    middle, whole, peak = statistics.median, 0.0, 0
    for number in range(given.rounds if not backend else min(given.rounds, 3)):
        with guest(folder, backend, given.memory, content, newer=given.newer) as machine:
            try:
                first.append(take(machine, folder))
            except NotLiveError as error:
                yield f"refused: {error.message} | | | | | "
                return
            again.append(take(machine, folder))
            if number:
                continue
            whole, peak = by_command(machine, folder, "--live")
            if not backend:
                others = [row_of_file(machine, folder), *row_of_pause(machine, folder)]
    yield (
        f"{1e3 * middle(one.pause for one in first):.1f} ms"
        f" | {1e3 * middle(one.pause for one in again):.1f} ms"
        f" | {middle(one.protected for one in first):.2f} s"
        f" | {100 * middle(one.slower for one in first):.0f} %"
        f" | {whole:.2f} s | {peak >> 20} MiB"
    )
    yield from others


def by_command(machine: QemuMachine, folder: Path, option: str) -> tuple[float, int]:
    """Return the time of the whole command, an ELF core, and its peak of memory."""
    words = cli_argv(
        *("--qmp", machine.qmp_sockets[0], option, "--no-vmcoreinfo", "--json"), folder / "x"
    )
    begun, peak = time.monotonic(), 0
    with Process(words, env=child_environment(), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = peak_of(process.pid) or peak
            time.sleep(0.01)
    assert not process.returncode
    (folder / "x").unlink()
    return time.monotonic() - begun, peak


def peak_of(pid: int | str) -> int:
    """Return the most memory that a process has had, in bytes; 0 when it is over.

    What `getrusage` has of a child is at least what its parent had.
    """
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(status.partition("VmHWM:")[2].partition("kB")[0] or 0) << 10


def row_of_pause(machine: QemuMachine, folder: Path) -> Iterator[str]:
    """Yield the rows of what stops the guest for the whole dump, or for the copy."""
    words = cli_argv(
        *("--qmp", machine.qmp_sockets[0], "--snapshot", "--no-vmcoreinfo", "--json"),
        folder / "x",
    )
    begun = time.monotonic()
    done = subprocess.run(words, env=child_environment(), capture_output=True, check=True)
    whole = time.monotonic() - begun
    pause = json.loads(done.stdout)["stopped_seconds"]
    (folder / "x").unlink()
    yield f"| `--snapshot` | {1e3 * pause:.0f} ms | | | | {whole:.2f} s | |"
    with RawQmp(machine.qmp_sockets[1], timeout_seconds=600) as qmp:
        begun = time.monotonic()
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{folder / 'x'}")
        whole = time.monotonic() - begun
    (folder / "x").unlink()
    yield f"| QEMU's own dump | {1e3 * whole:.0f} ms | | | | {whole:.2f} s | |"


def spooled(address: str, folder: Path) -> None:
    """Take a live dump whose copy is in a file; print the peak of memory."""
    copy_store.available_memory = lambda: 0
    with (
        connect_qmp(address) as monitor,
        live_guest(GuestAccess.by_qmp(monitor), folder) as live,
    ):
        print(json.dumps([live.pause.seconds(), live.protected_seconds, peak_of("self")]))


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
        f"| the copy in a file | | {1e3 * pause:.1f} ms | {protected:.2f} s | |"
        f" | {peak >> 20} MiB |"
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
    print(
        "| memory backend | pause | again | slow to write | slower by | whole dump | peak memory |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder, content = Path(name), None
        if given.fill:
            content = folder / "content"
            with content.open("wb") as file:  # by pieces: children begin with our peak of memory
                for _ in range(given.fill):
                    file.write(os.urandom(_MIB))
        for label, backend in _BACKENDS.items():
            if label.startswith(given.only):
                row, *others = by_stream(folder, backend, given, content)
                print(f"| {label} | {row} |", *others, sep="\n", flush=True)


if __name__ == "__main__":
    main()
