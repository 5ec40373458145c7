"""`qemu-dump estimate`: how large dumps of a guest will be, before one is taken."""

from __future__ import annotations

import argparse

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.connections.target import (
    add_target_arguments,
    open_guest,
    target_of_arguments,
)
from qemu_dump_ext.dump_formats import all_dump_formats, find_dump_format
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.estimate import Estimate, estimate
from qemu_dump_ext.engine.guest_view import GuestView
from qemu_dump_ext.engine.stopped_guest import stopped_guest
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.errors import EXIT_SUCCESS, RequestError
from qemu_dump_ext.memory_sources import AUTO, all_memory_sources
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.printable import printable
from qemu_dump_ext.standard_error import tell

_DEFAULT_FORMAT = "kdump-zlib"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help="a dump: ELF or kdump")
    add_target_arguments(parser)
    parser.add_argument(
        "--memory",
        default=AUTO,
        choices=(AUTO, *all_memory_sources()),
        help="of a live guest: where guest memory comes from; auto takes the fastest that works",
    )
    parser.add_argument(
        "--format",
        default=_DEFAULT_FORMAT,
        metavar="NAME",
        choices=all_dump_formats(),
        help=f"format of the dumps by its name in QMP; default: {_DEFAULT_FORMAT}",
    )
    parser.add_argument(
        "--kernel",
        metavar="RELEASE",
        help="by this kernel (as 'uname -r' prints it, or its note's address as 0x...) where"
        " memory has several",
    )
    parser.add_argument("--json", action="store_true", help="answer as one line of JSON")


def _run(arguments: argparse.Namespace) -> int:
    found = _estimate(arguments)
    for remark in found.remarks:
        tell(printable(remark))
    print(found.to_json() if arguments.json else printable("\n".join(found.lines())))
    return EXIT_SUCCESS


def _estimate(arguments: argparse.Namespace) -> Estimate:
    target = target_of_arguments(arguments)
    if (arguments.file is None) != target.is_told:
        raise RequestError(
            "of which guest?", hint="name a dump, or a live guest, as by --guest NAME"
        )
    request = DumpRequest(format=arguments.format)
    find_dump_format(request.format).require(request)

    def of(guest: GuestView) -> Estimate:
        return estimate(guest, guest.find_vmcoreinfo(arguments.kernel), request)

    if arguments.file is not None:
        with open_dump(arguments.file) as dump:
            return of(StoredGuest(dump))
    with open_guest(target) as access, stopped_guest(access, arguments.memory) as guest:
        return of(guest)


COMMAND = Subcommand(
    "estimate",
    "show how large dumps of a guest will be at each dump level",
    _add_arguments,
    _run,
    examples=("--qmp /run/vm.qmp", "vm.kdump --format elf"),
)
