"""`qemu-info-guest` in gdb."""

from __future__ import annotations

from collections.abc import Sequence

from gdb_boundary import QemuCommand, command_parser, option_words
from gdb_guest import guest_access

import gdb
from qemu_dump_ext.connections.target import target_of_arguments
from qemu_dump_ext.engine.info import describe_guest
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable

_NAME = "qemu-info-guest"


def _run(words: Sequence[str]) -> int:
    arguments = command_parser(_NAME).parse_args(words)
    with guest_access(target_of_arguments(arguments)) as access:
        description = describe_guest(access)
    text = description.to_json() if arguments.json else "\n".join(description.lines())
    gdb.write(printable(text) + "\n")
    return EXIT_SUCCESS


def _complete(_before: Sequence[str], word: str) -> Sequence[str] | None:
    return option_words(_NAME) if word.startswith("-") else None


COMMAND = QemuCommand(_run, _complete)
