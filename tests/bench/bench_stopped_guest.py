"""Count the questions to QEMU and the guest's pause of what is done with a Linux guest.

    .venv/bin/python tests/bench/bench_stopped_guest.py [--memory MIB] [--rounds N]

Starts a guest on q35 and puts a relay in front of its QMP socket, which counts commands and takes
the time between QEMU's events STOP and RESUME. Prints a table in Markdown: the log, the description
and a dump, by three commands and (where this version can) of one guest that is stopped once; and a
crash that is collected. Medians of the questions, and the shortest pause.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import qemu_dump_ext
from qemu_dump_ext.crash_collector.collect_now import collect_crash
from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore

_CHUNK = 1 << 16
_DESCRIPTORS = 4


class CountingRelay:
    """Stands between a QMP socket and one client after the other, descriptors included.

    Attributes:
        path: Where clients connect.
        questions: Commands since `clear`.
        stopped_seconds: For which the guest stood still since then.
    """

    def __init__(self, upstream: Path, path: Path) -> None:
        self.path = path
        self._upstream = upstream
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.clear()
        threading.Thread(target=self._serve, daemon=True).start()

    def clear(self) -> None:
        """Begin again."""
        self.questions, self.stopped_seconds, self._stopped_at = 0, 0.0, 0.0
        self._rest = b""

    def _serve(self) -> None:
        while True:
            client = self._listener.accept()[0]
            qemu = socket.socket(socket.AF_UNIX)
            qemu.connect(str(self._upstream))
            threading.Thread(
                target=self._pump, args=(qemu, client, self._note_answer), daemon=True
            ).start()
            self._pump(client, qemu, self._note_command)

    def _pump(
        self, source: socket.socket, target: socket.socket, note: Callable[[bytes], None]
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, descriptors, _, _ = socket.recv_fds(source, _CHUNK, _DESCRIPTORS)
                if not data:
                    break
                note(data)
                sent = socket.send_fds(target, [data], descriptors)
                target.sendall(data[sent:])
                for descriptor in descriptors:
                    os.close(descriptor)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _note_command(self, data: bytes) -> None:
        self.questions += data.count(b'"execute"')

    def _note_answer(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            event = json.loads(line) if b'"event"' in line else {}
            if event.get("event") in {"STOP", "RESUME"}:
                stamp = event["timestamp"]
                moment = stamp["seconds"] + stamp["microseconds"] / 1e6
                if event["event"] == "STOP":
                    self._stopped_at = moment
                else:
                    self.stopped_seconds += moment - self._stopped_at


def by_commands(qmp: str, directory: Path) -> None:
    """Show the log, describe the guest and dump it, each by its command."""
    programs = Path(sys.prefix) / "bin"
    for words in (
        ("qemu-dump", "dmesg", "--qmp", qmp),
        ("qemu-dump", "info", "--qmp", qmp),
        ("qemu-dump-guest-memory", "--qmp", qmp, "--force", str(directory / "dump")),
    ):
        subprocess.run(
            [programs / words[0], *words[1:]], check=True, capture_output=True, cwd=directory
        )


def stopped_once(qmp: str, directory: Path) -> None:
    """Do the same with one guest that is stopped once."""
    with qemu_dump_ext.connect(qmp) as guest, guest.stopped() as still:
        still.log()
        still.info()
        still.dump(directory / "dump", force=True)


def collected(qmp: str, directory: Path) -> None:
    """Collect a crash, as the crash collector does."""
    collect_crash(qmp, directory / "store")


CASES: Mapping[str, Callable[[str, Path], None]] = {
    "three commands": by_commands,
    "stopped once": stopped_once,
    "crash collected": collected,
}


def measure(guest: BootedGuest, rounds: int, directory: Path) -> Iterator[str]:
    """Yield the rows of the table."""
    relay = CountingRelay(guest.qmp_sockets[0], directory / "relay")
    for name, work in CASES.items():
        if work is stopped_once and not hasattr(qemu_dump_ext, "connect"):
            continue
        found = []
        for _ in range(rounds):
            relay.clear()
            work(str(relay.path), directory)
            found.append((relay.questions, relay.stopped_seconds))
        questions = statistics.median(count for count, _ in found)
        seconds = min(seconds for _, seconds in found)
        yield f"| {name} | {questions:.0f} | {seconds:.3f} s |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--memory", type=int, default=256, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    image = replace(find_image("x86_64"), devices=())
    files = ImageStore(default_cache()).fetch(image)
    print("| log, description and dump | questions | shortest pause |")
    print("|---|---|---|")
    with (
        BootedGuest(image, files, memory_mib=arguments.memory) as guest,
        tempfile.TemporaryDirectory() as directory,
    ):
        for row in measure(guest, arguments.rounds, Path(directory)):
            print(row)


if __name__ == "__main__":
    main()
