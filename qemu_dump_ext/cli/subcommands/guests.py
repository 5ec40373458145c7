"""`qemu-dump guests`: which guests run on this host, and the ways to each."""

from __future__ import annotations

import argparse

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.engine.guests import guest_names, lines_of, list_guests, to_json
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="answer as one line of JSON")
    shown.add_argument(
        "--names",
        action="store_true",
        help="print by which names guests can be called, and no more",
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.names:
        lines = guest_names()
    else:
        guests = list_guests()
        lines = [to_json(guests)] if arguments.json else lines_of(guests)
    for line in lines:
        print(printable(line))
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "guests",
    "show the guests of this host, and the ways to them",
    _add_arguments,
    _run,
    examples=("", "--json"),
)
