"""Measure how long it takes to tell the pages of level 31 apart, of a stopped Linux of each target.

    .venv/bin/python -m tests.bench.bench_page_filter [--memory MIB] [--rounds N] [TARGET ...]

Prints a table in Markdown: the least CPU and wall time of several rounds for each GiB of the guest,
by `--exact` and by default, which walks the kernel's page tables as well.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from qemu_dump_ext.engine.stopped_guest import stopped_guest
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from qemu_dump_ext.linux.page_filter import FilterRules
from qemu_dump_ext.qemu.qmp import connect_qmp
from tests.support.raw_qmp import RawQmp

_TARGETS = ("x86_64", "i386", "aarch64", "arm", "ppc64le", "riscv64", "s390x")
GIB = 1 << 30


def milliseconds(socket: str, rounds: int, *, exact: bool) -> tuple[float, float]:
    """Return CPU and wall time for each GiB."""
    found = []
    with connect_qmp(socket) as qmp:
        for _ in range(rounds):
            # Each by itself: what has been found is kept.
            with stopped_guest(GuestAccess.by_qmp(qmp), "process") as guest:
                pages = guest.kernel_pages(guest.find_vmcoreinfo())
                cpu, wall = time.process_time(), time.perf_counter()
                pages.excluded(FilterRules(31, exact))
                size = sum(block.size for block in guest.ram_blocks) / GIB
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                found.append((1000 * cpu / size, 1000 * wall / size))
    return min(cpu for cpu, _ in found), min(wall for _, wall in found)


def rows(targets: list[str], memory_mib: int, rounds: int) -> Iterator[str]:
    """Boot one guest after the other, and measure."""
    for name in targets:
        image = find_image(name)
        files = ImageStore(default_cache()).fetch(image)
        with BootedGuest(image, files, memory_mib=memory_mib) as guest:
            with RawQmp(guest.qmp_sockets[1]) as qmp:
                qmp.execute("stop")
            socket = str(guest.qmp_sockets[0])
            times = [milliseconds(socket, rounds, exact=exact) for exact in (True, False)]
        cells = " | ".join(f"{cpu:.0f} ms | {wall:.0f} ms" for cpu, wall in times)
        yield f"| {name}, Linux {files.release} | {cells} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("targets", nargs="*", default=_TARGETS, metavar="TARGET")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print("| guest | `--exact`: CPU time | wall time | default: CPU time | wall time |")
    print("|---|---|---|---|---|")
    for row in rows(arguments.targets, arguments.memory, arguments.rounds):
        print(row, flush=True)


if __name__ == "__main__":
    main()
