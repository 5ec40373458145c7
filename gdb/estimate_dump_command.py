"""`qemu-estimate-dump` in gdb."""

from __future__ import annotations

from collections.abc import Sequence

from gdb_boundary import QemuCommand, command_parser, option_words
from gdb_guest import guest_access

import gdb
from qemu_dump_ext.connections.target import target_of_arguments
from qemu_dump_ext.dump_formats import all_dump_formats
from qemu_dump_ext.engine.estimate import estimate_running
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.memory_sources import AUTO, all_memory_sources
from qemu_dump_ext.options.estimate_options import request_of_estimate
from qemu_dump_ext.printable import printable

_NAME = "qemu-estimate-dump"


def _run(words: Sequence[str]) -> int:
    arguments = command_parser(_NAME).parse_args(words)
    request = request_of_estimate(arguments)
    with guest_access(target_of_arguments(arguments)) as access:
        found = estimate_running(access, request, arguments.memory, kernel=arguments.kernel)
    lines = [found.to_json()] if arguments.json else [*found.remarks, *found.lines()]
    gdb.write(printable("\n".join(lines)) + "\n")
    return EXIT_SUCCESS


def _complete(before: Sequence[str], word: str) -> Sequence[str] | None:
    values = {"--format": list(all_dump_formats()), "--memory": [AUTO, *all_memory_sources()]}
    previous = before[-1] if before else ""
    return values.get(previous) or (option_words(_NAME) if word.startswith("-") else None)


COMMAND = QemuCommand(_run, _complete)
