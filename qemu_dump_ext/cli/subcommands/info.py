"""`qemu-dump info`: what would be dumped of a guest, and in which formats."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.connections.target import (
    add_target_arguments,
    open_guest,
    target_of_arguments,
)
from qemu_dump_ext.engine.capabilities import query_capabilities
from qemu_dump_ext.engine.info import describe_guest
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable
from qemu_dump_ext.sinks import open_sink


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target_arguments(parser)
    parser.add_argument(
        "--save",
        metavar="FILE",
        help="also write down where QEMU's process has the guest's RAM, for a dump by --description"
        " FILE when its monitor does not answer any more",
    )
    parser.add_argument("--force", action="store_true", help="with --save: replace FILE")
    parser.add_argument("--json", action="store_true", help="answer as one line of JSON")


def _run(arguments: argparse.Namespace) -> int:
    with open_guest(target_of_arguments(arguments)) as access, ExitStack() as saving:
        sink = None
        if arguments.save is not None:
            sink = saving.enter_context(
                open_sink(arguments.save, force=arguments.force, standard_output=None)
            )
        description = describe_guest(access, save=None if sink is None else sink.write)
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
