"""`qemu-dump estimate`: how large dumps of a guest will be, before one is taken."""

from __future__ import annotations

import argparse
import sys

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli._source_arguments import (
    ANY_DUMP,
    add_source_arguments,
    add_target_argument,
    open_guest_of,
    refuse_guest_arguments,
    refuse_source_arguments,
)
from qemu_dump_ext.cli.gdb_driver import quote_for_gdb, run_through_gdb
from qemu_dump_ext.connections.target import GuestTarget, open_guest, target_of_arguments
from qemu_dump_ext.engine.estimate import Estimate, estimate, estimate_running
from qemu_dump_ext.errors import EXIT_SUCCESS, RequestError
from qemu_dump_ext.options.dump_options import words_of_options
from qemu_dump_ext.options.estimate_options import add_estimate_arguments, request_of_estimate
from qemu_dump_ext.printable import printable
from qemu_dump_ext.standard_error import tell


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help=ANY_DUMP)
    parser.add_argument(
        "--gdb",
        metavar="ADDRESS",
        help="a live guest by its gdbstub (unix path or HOST:PORT), to which a gdb is attached;"
        " with --qmp, the run state before gdb stopped it is known",
    )
    add_source_arguments(parser)
    add_target_argument(parser)
    add_estimate_arguments(parser)


def _run(arguments: argparse.Namespace) -> int:
    target = target_of_arguments(arguments)
    if (arguments.file is None) != (target.is_told or arguments.gdb is not None):
        raise RequestError(
            "of which guest?", hint="name a dump, or a live guest, as by --guest NAME"
        )
    if arguments.file is None:
        refuse_source_arguments(arguments)
    else:
        refuse_guest_arguments(arguments)
    if arguments.gdb is not None:
        words = words_of_options(arguments, add_estimate_arguments)
        command = " ".join(["qemu-estimate-dump", *map(quote_for_gdb, words)])
        return run_through_gdb(arguments.gdb, target, command, output=sys.stdout)
    found = _estimate(arguments, target)
    for remark in found.remarks:
        tell(printable(remark))
    print(found.to_json() if arguments.json else printable("\n".join(found.lines())))
    return EXIT_SUCCESS


def _estimate(arguments: argparse.Namespace, target: GuestTarget) -> Estimate:
    request = request_of_estimate(arguments)
    if arguments.file is not None:
        with open_guest_of(arguments.file, arguments) as guest:
            return estimate(guest, guest.find_vmcoreinfo(arguments.kernel), request)
    with open_guest(target) as access:
        return estimate_running(access, request, arguments.memory, kernel=arguments.kernel)


COMMAND = Subcommand(
    "estimate",
    "show how large dumps of a guest will be at each dump level",
    _add_arguments,
    _run,
    examples=("--qmp /run/vm.qmp", "--guest web1 --json", "vm.kdump --format elf"),
)
