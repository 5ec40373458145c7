"""`qemu-crash-collector report`: the crashes as a page of HTML."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_store, configuration_of
from qemu_dump_ext.crash_collector.outlets.report import REPORT_FILE, write_report
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help=f"where to; default: `report` of the configuration, or {REPORT_FILE} in the store",
    )


def _run(arguments: argparse.Namespace) -> int:
    path, configured = arguments.store, None
    if path is None:
        configuration = configuration_of(arguments)
        path, configured = configuration.store, configuration.report
    output: Path = arguments.output or configured or path / REPORT_FILE
    write_report(CrashStore(path), output, now=datetime.now(UTC))
    print(printable(str(output)))
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "report",
    "write a page of HTML about all crashes",
    _add_arguments,
    _run,
    examples=("", "--output crashes.html"),
)
