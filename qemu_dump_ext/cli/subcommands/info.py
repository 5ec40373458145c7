"""`qemu-dump info`: what would be dumped of a guest, and in which formats."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.engine.capabilities import query_capabilities
from qemu_dump_ext.engine.info import describe_guest
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.printable import printable
from qemu_dump_ext.qemu.qmp import connect_qmp


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--qmp", metavar="SOCKET", required=True, help="QMP socket of the guest")
    parser.add_argument("--json", action="store_true", help="answer as one line of JSON")


def _run(arguments: argparse.Namespace) -> int:
    with connect_qmp(arguments.qmp) as monitor:
        description = describe_guest(GuestAccess.by_qmp(monitor))
    capabilities = query_capabilities()
    if arguments.json:
        print(json.dumps(asdict(description) | asdict(capabilities)))
    else:
        print(printable("\n".join(description.lines() + capabilities.lines())))
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "info",
    "show what would be dumped of a guest",
    _add_arguments,
    _run,
    examples=("--qmp /run/vm.qmp", "--qmp /run/vm.qmp --json"),
)
