"""`qemu-dump resume`: let a guest run that a dump has left stopped which was killed."""

from __future__ import annotations

import argparse

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.connections.target import (
    GuestTarget,
    add_target_arguments,
    open_guest,
    target_of_arguments,
)
from qemu_dump_ext.engine.resume import resume_guest
from qemu_dump_ext.errors import EXIT_SUCCESS, RequestError
from qemu_dump_ext.printable import printable


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="GUEST", nargs="?", help="as --guest GUEST")
    add_target_arguments(parser)


def _run(arguments: argparse.Namespace) -> int:
    target = target_of_arguments(arguments)
    if arguments.name is not None:
        if target.is_told:
            raise RequestError("GUEST and an option that names a guest are the same: give one")
        target = GuestTarget(guest=arguments.name)
    with open_guest(target) as access:
        print(printable(resume_guest(access)))
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "resume",
    "let a guest run that a dump has left stopped which was killed",
    _add_arguments,
    _run,
    examples=("web1", "--pid 4711"),
)
