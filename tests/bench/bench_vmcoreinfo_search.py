"""Measure the search for VMCOREINFO through all memory of one stopped Linux guest.

    .venv/bin/python -m tests.bench.bench_vmcoreinfo_search [--memory MIB] [--fill MIB] [--rounds N]

Prints a table in Markdown: medians of the whole search, which a dump ends at the live kernel.
"""

from __future__ import annotations

import argparse
import statistics
import time

from qemu_dump_ext.guest.access import GuestAccess, SourceContext
from qemu_dump_ext.linux.vmcoreinfo_search import NoteSearch
from qemu_dump_ext.memory_sources import open_memory
from qemu_dump_ext.qemu.probe import probe_guest
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.structures.dialect import MENDED
from tests.bench.bench_dump import stopped_guest

GIB = 1 << 30


def search_seconds(socket: str, memory: str) -> tuple[float, int]:
    """Return how long all memory takes, and how many bytes that is."""
    with connect_qmp(socket) as monitor:
        access = GuestAccess.by_qmp(monitor)
        guest = probe_guest(access)
        core = guest.architecture.select_core(guest.vcpus, guest.ram_blocks, MENDED, guest.machine)
        context = SourceContext(monitor, None, guest.ram_blocks, (socket,))
        with open_memory(memory, context) as opened:
            started = time.perf_counter()
            search = NoteSearch(
                guest.architecture, core.byte_order, opened.memory, guest.ram_blocks, guest.vcpus
            )
            if not list(search.candidates()):
                raise SystemExit("no VMCOREINFO was found")
            seconds = time.perf_counter() - started
    return seconds, sum(block.size for block in guest.ram_blocks)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--memory", type=int, default=2048, metavar="MIB")
    parser.add_argument("--fill", type=int, default=850, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("| search for VMCOREINFO, memory by | all memory | per GiB |")
    print("|---|---|---|")
    with stopped_guest(arguments.memory, arguments.fill) as guest:
        for memory in ("process", "pmemsave"):
            found = [
                search_seconds(str(guest.qmp_sockets[0]), memory) for _ in range(arguments.rounds)
            ]
            seconds, size = statistics.median(one[0] for one in found), found[0][1]
            print(f"| {memory} | {seconds:.2f} s | {seconds * GIB / size:.2f} s |")


if __name__ == "__main__":
    main()
