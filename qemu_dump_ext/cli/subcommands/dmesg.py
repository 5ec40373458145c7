"""`qemu-dump dmesg`: the guest kernel's log, as makedumpfile --dump-dmesg prints it."""

from __future__ import annotations

import argparse

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli._description import add_description_argument
from qemu_dump_ext.cli._source_arguments import (
    ANY_DUMP,
    add_source_arguments,
    add_target_argument,
    open_guest_of,
    refuse_guest_arguments,
    refuse_source_arguments,
)
from qemu_dump_ext.connections.silent import open_guest_or_memory
from qemu_dump_ext.connections.target import add_target_arguments, target_of_arguments
from qemu_dump_ext.engine.convert import SEARCH_SECONDS
from qemu_dump_ext.engine.dmesg import GuestLog, log_of_guest, read_log
from qemu_dump_ext.errors import EXIT_SUCCESS, RequestError
from qemu_dump_ext.memory_sources import AUTO, all_memory_sources
from qemu_dump_ext.memory_sources.process import SOURCE as PROCESS
from qemu_dump_ext.options.dump_options import positive_seconds
from qemu_dump_ext.printable import printable
from qemu_dump_ext.standard_error import tell


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help=ANY_DUMP)
    add_source_arguments(parser)
    add_target_argument(parser)
    add_target_arguments(parser)
    parser.add_argument(
        "--memory",
        default=AUTO,
        choices=(AUTO, *all_memory_sources()),
        help="of a live guest: where guest memory comes from; auto takes the fastest that works",
    )
    add_description_argument(parser)
    parser.add_argument(
        "--kernel",
        metavar="RELEASE",
        help="of this kernel (as 'uname -r' prints it, or its note's address as 0x...) where"
        " memory has several",
    )
    parser.add_argument(
        "--search-seconds",
        type=positive_seconds,
        default=SEARCH_SECONDS,
        metavar="N",
        help="with FILE: how long to search a dump that has no VMCOREINFO for one in guest memory;"
        f" default: {SEARCH_SECONDS:g}",
    )


def _run(arguments: argparse.Namespace) -> int:
    log = _read(arguments)
    for remark in log.remarks:
        tell(printable(remark))
    for record in log.records:
        print(printable(record.line()))
    return EXIT_SUCCESS


def _read(arguments: argparse.Namespace) -> GuestLog:
    target = target_of_arguments(arguments)
    if (arguments.file is None) != target.is_told:
        raise RequestError("whose log?", hint="name a dump, or a live guest, as by --guest NAME")
    if arguments.file is not None:
        refuse_guest_arguments(arguments)
        seconds = arguments.search_seconds
        with open_guest_of(arguments.file, arguments, search_seconds=seconds) as stored:
            return read_log(stored, kernel=arguments.kernel)
    refuse_source_arguments(arguments)
    alone = arguments.memory == PROCESS.name
    with open_guest_or_memory(
        target, memory_alone=alone, description=arguments.description
    ) as access:  # which is stopped meanwhile
        return log_of_guest(access, memory=arguments.memory, kernel=arguments.kernel)


COMMAND = Subcommand(
    "dmesg",
    "show the guest kernel's log",
    _add_arguments,
    _run,
    examples=("vm.kdump", "--qmp /run/vm.qmp"),
)
