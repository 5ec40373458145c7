"""The options of `qemu-dump estimate`, the same in gdb and on the command line."""

from __future__ import annotations

import argparse

from qemu_dump_ext.connections.target import add_target_arguments
from qemu_dump_ext.dump_formats import all_dump_formats, find_dump_format
from qemu_dump_ext.memory_sources import AUTO, all_memory_sources
from qemu_dump_ext.options.words import Words
from qemu_dump_ext.plan.request import DumpRequest

_DEFAULT_FORMAT = "kdump-zlib"


def add_estimate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that both doors have."""
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
        choices=Words(_formats),
        help=f"format of the dumps by its name in QMP; default: {_DEFAULT_FORMAT}",
    )
    parser.add_argument(
        "--kernel",
        metavar="RELEASE",
        help="by this kernel (as 'uname -r' prints it, or its note's address as 0x...) where"
        " memory has several",
    )
    parser.add_argument("--json", action="store_true", help="answer as one line of JSON")


def _formats() -> list[str]:
    return [name for name, one in all_dump_formats().items() if not one.of_windows]


def request_of_estimate(arguments: argparse.Namespace) -> DumpRequest:
    """Return the dump of which the options ask how large it will be.

    Raises:
        CodecUnavailableError: A package cannot be imported.
    """
    request = DumpRequest(format=arguments.format)
    find_dump_format(request.format).require(request)
    return request
