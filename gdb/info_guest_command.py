"""`qemu-info-guest` in gdb."""

from __future__ import annotations

from collections.abc import Sequence

from gdb_boundary import GdbParser, QemuCommand, option_words
from gdb_guest import guest_access

import gdb
from qemu_dump_ext.connections.target import add_target_arguments, target_of_arguments
from qemu_dump_ext.engine.info import describe_guest
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable


def _parser() -> GdbParser:
    parser = GdbParser(
        prog="qemu-info-guest",
        description="Show what would be dumped: RAM blocks, vCPUs, and which memory sources can"
        " be used, or why not.",
    )
    add_target_arguments(parser)
    parser.add_argument("--json", action="store_true", help="answer as one line of JSON")
    return parser


def _run(words: Sequence[str]) -> int:
    arguments = _parser().parse_args(words)
    with guest_access(target_of_arguments(arguments)) as access:
        description = describe_guest(access)
    text = description.to_json() if arguments.json else "\n".join(description.lines())
    gdb.write(printable(text) + "\n")
    return EXIT_SUCCESS


def _complete(_before: Sequence[str], word: str) -> Sequence[str] | None:
    return option_words(_parser()) if word.startswith("-") else None


QemuCommand(_parser(), _run, _complete)
