"""The options that say which dump is read, the same for all that read one."""

from __future__ import annotations

import argparse

from qemu_dump_ext.dump_readers import DumpFile, open_dump
from qemu_dump_ext.errors import RequestError

ANY_DUMP = "a dump of any format that is read; told by what is in it"
"""Help of the word that names one."""


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what may be said of a dump besides the name of its file."""
    parser.add_argument(
        "--part",
        dest="parts",
        action="append",
        default=[],
        metavar="FILE",
        help="another file of a dump that makedumpfile has split, once for each",
    )
    parser.add_argument(
        "--layout",
        metavar="LAYOUT",
        help="the dump is RAM without any headers, which lies like this: a machine (q35,"
        " aarch64/virt), or GPA:SIZE[@OFFSET],...",
    )
    parser.add_argument(
        "--snapshot-name",
        metavar="NAME",
        help="of a qcow2 image with several snapshots: that with the guest's state; or its ID",
    )


def open_source(path: str, arguments: argparse.Namespace) -> DumpFile:
    """Open the dump that a command line names; errors as `open_dump`."""
    if path == "-":
        raise RequestError("a dump is read from a file, and not from standard input")
    return open_dump(
        path,
        *arguments.parts,
        layout=arguments.layout,
        snapshot_name=arguments.snapshot_name,
    )
