"""`qemu-dump-guest-memory` in gdb."""

from __future__ import annotations

from collections.abc import Sequence

from gdb_boundary import QemuCommand, command_parser, option_words, shown_progress
from gdb_guest import guest_access

import gdb
from qemu_dump_ext.connections.target import target_of_arguments
from qemu_dump_ext.dump_formats import all_dump_formats, format_words
from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.memory_sources import AUTO, all_memory_sources
from qemu_dump_ext.options.dump_options import (
    PROGRESS_CHOICES,
    parse_dump_arguments,
    read_registers,
    request_of,
)
from qemu_dump_ext.plan.request import Live
from qemu_dump_ext.printable import printable
from qemu_dump_ext.sinks import open_sink

_NAME = "qemu-dump-guest-memory"


def _run(words: Sequence[str]) -> int:
    arguments = parse_dump_arguments(command_parser(_NAME), words)
    sink = open_sink(arguments.file, force=arguments.force, standard_output=None)
    with (
        guest_access(target_of_arguments(arguments)) as access,
        sink,
        shown_progress(arguments.progress) as progress,
    ):
        read_registers(arguments, access.monitor)
        report = dump(
            request_of(arguments), access, sink, memory=arguments.memory, progress=progress
        )
    lines = (*report.lines(verbose=arguments.verbose), *report.opening_line())
    text = report.to_json() if arguments.json else "\n".join(lines)
    gdb.write(printable(text) + "\n")
    return report.exit_status


def _complete(before: Sequence[str], word: str) -> Sequence[str] | None:
    values = {
        "-z": format_words(),
        "--format": list(all_dump_formats()),
        "--live": tuple(Live),
        "--memory": [AUTO, *all_memory_sources()],
        "--progress": PROGRESS_CHOICES,
    }
    previous = before[-1] if before else ""
    if previous in values and any(choice.startswith(word) for choice in values[previous]):
        return values[previous]
    return option_words(_NAME) if word.startswith("-") else None


COMMAND = QemuCommand(_run, _complete, interrupted="no partial dump was left behind")
