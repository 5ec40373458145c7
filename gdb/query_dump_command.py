"""`qemu-query-dump` in gdb."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from gdb_boundary import QemuCommand, command_parser, option_words

import gdb
from qemu_dump_ext.engine.capabilities import query_capabilities
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable

_NAME = "qemu-query-dump"


def _run(words: Sequence[str]) -> int:
    arguments = command_parser(_NAME).parse_args(words)
    capabilities = query_capabilities()
    text = json.dumps(asdict(capabilities)) if arguments.json else "\n".join(capabilities.lines())
    gdb.write(printable(text) + "\n")
    return EXIT_SUCCESS


def _complete(_before: Sequence[str], _word: str) -> Sequence[str]:
    return option_words(_NAME)


COMMAND = QemuCommand(_run, _complete)
