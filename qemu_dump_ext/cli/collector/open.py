"""`qemu-crash-collector open`: the dump of a crash, in crash, drgn or gdb."""

from __future__ import annotations

import argparse
from pathlib import Path

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli._start_reader import start_reader
from qemu_dump_ext.cli.collector._arguments import CRASH_HELP, add_store, store_of
from qemu_dump_ext.cli.collector._opening import opening_of
from qemu_dump_ext.crash_collector.store.lookup import LATEST, find_crash
from qemu_dump_ext.engine.opening import READERS
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument(
        "crash", metavar="ID", nargs="?", default=LATEST, help=f"{CRASH_HELP}; default: {LATEST}"
    )
    parser.add_argument(
        "--reader",
        choices=READERS,
        help="which reader opens it; default: crash, where there is a vmlinux, or else drgn",
    )
    parser.add_argument(
        "--vmlinux",
        metavar="FILE",
        type=Path,
        help="the kernel's vmlinux with DWARF; default: the configuration's, or what is found",
    )

    parser.add_argument(
        "--print", action="store_true", help="print the command instead of starting it"
    )


def _run(arguments: argparse.Namespace) -> int:
    store = store_of(arguments)
    record = store.record(find_crash(store, arguments.crash))
    found = opening_of(arguments, store, record, reader=arguments.reader, vmlinux=arguments.vmlinux)
    if arguments.print:
        print(printable(found.line()))
        return EXIT_SUCCESS
    return start_reader(found)


COMMAND = Subcommand(
    "open",
    "open the dump of a crash in crash, drgn or gdb",
    _add_arguments,
    _run,
    examples=("", "web1", "20260131T12 --reader drgn"),
)
