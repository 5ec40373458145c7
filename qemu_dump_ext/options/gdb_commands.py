"""The options of the commands in gdb, apart from gdb: their help is written without one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TypeVar

from qemu_dump_ext.connections.target import add_target_arguments
from qemu_dump_ext.options.dump_options import add_dump_arguments, add_file_arguments
from qemu_dump_ext.options.estimate_options import add_estimate_arguments
from qemu_dump_ext.options.parsers import OneLineParser
from qemu_dump_ext.sinks import target_forms
from qemu_dump_ext.value import Value

ParserT = TypeVar("ParserT", bound=OneLineParser)


class GdbCommand(Value):
    """What a command in gdb understands.

    Attributes:
        description: What it does; all that `apropos` shows.
        add_arguments: Declares its options.
        epilog: Stands at the end of its help.
    """

    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    epilog: str | None = None


def _add_dump(parser: argparse.ArgumentParser) -> None:
    add_dump_arguments(parser)
    add_file_arguments(parser, target_forms())


def _add_info(parser: argparse.ArgumentParser) -> None:
    add_target_arguments(parser)
    _add_query(parser)


def _add_query(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="answer as one line of JSON")


GDB_COMMANDS: Mapping[str, GdbCommand] = {
    "qemu-dump-guest-memory": GdbCommand(
        "Dump the memory and the registers of the QEMU guest that gdb is attached to.",
        _add_dump,
        "$_qemu_dump_status is 0 afterwards if the dump is complete, 6 if a register is"
        " missing in it, and another exit status of the command of that name if it failed.",
    ),
    "qemu-estimate-dump": GdbCommand(
        "Show how large dumps of the guest that gdb is attached to will be at each dump level,"
        " before one is taken.",
        add_estimate_arguments,
    ),
    "qemu-info-guest": GdbCommand(
        "Show what would be dumped: RAM blocks, vCPUs, and which memory sources can be used,"
        " or why not.",
        _add_info,
    ),
    "qemu-query-dump": GdbCommand(
        "Show the formats that can be written here and now, as QMP's"
        " query-dump-guest-memory-capability does, and why others cannot.",
        _add_query,
    ),
}
"""By name."""


def gdb_parser(name: str, kind: type[ParserT]) -> ParserT:
    """Return the parser of a command in gdb, made by its class."""
    command = GDB_COMMANDS[name]
    parser = kind(prog=name, description=command.description, epilog=command.epilog)
    command.add_arguments(parser)
    return parser


def gdb_help(name: str) -> str:
    """Return what gdb shows as the help of a command; `apropos` shows its first line."""
    return f"{GDB_COMMANDS[name].description}\n\n{gdb_parser(name, OneLineParser).format_help()}"
