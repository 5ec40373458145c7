"""`qemu-query-dump` in gdb."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from gdb_boundary import GdbParser, QemuCommand, option_words

import gdb
from qemu_dump_ext.engine.capabilities import query_capabilities
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable


def _parser() -> GdbParser:
    parser = GdbParser(
        prog="qemu-query-dump",
        description="Show the formats that can be written here and now, as QMP's"
        " query-dump-guest-memory-capability does, and why others cannot.",
    )
    parser.add_argument("--json", action="store_true", help="answer as one line of JSON")
    return parser


def _run(words: Sequence[str]) -> int:
    arguments = _parser().parse_args(words)
    capabilities = query_capabilities()
    text = json.dumps(asdict(capabilities)) if arguments.json else "\n".join(capabilities.lines())
    gdb.write(printable(text) + "\n")
    return EXIT_SUCCESS


def _complete(_before: Sequence[str], _word: str) -> Sequence[str]:
    return option_words(_parser())


QemuCommand(_parser(), _run, _complete)
