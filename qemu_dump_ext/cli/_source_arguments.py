"""The options that say which dump is read, the same for all that read one."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.dump_readers import DumpFile, open_dump
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.memory_sources import AUTO
from qemu_dump_ext.printable import printable
from qemu_dump_ext.standard_error import tell

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


def add_target_argument(parser: argparse.ArgumentParser) -> None:
    """Declare what may be said of the guest in a dump."""
    parser.add_argument(
        "--target",
        choices=tuple(all_architectures()),
        metavar="NAME",
        help="the guest's target by its name in QEMU, where nothing in the dump tells it",
    )


def refuse_source_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what is said of a dump where there is none.

    Raises:
        RequestError: It is said.
    """
    for name in ("part", "layout", "snapshot_name", "target"):
        if getattr(arguments, "parts" if name == "part" else name):
            word = name.replace("_", "-")
            raise RequestError(f"--{word} is for dumps, and not for guests that are there")


def refuse_guest_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what is said of a guest that is there, where there is a dump of one.

    Raises:
        RequestError: It is said.
    """
    said = {
        "memory": arguments.memory != AUTO,
        "description": getattr(arguments, "description", None) is not None,
    }
    for word in (word for word, is_said in said.items() if is_said):
        raise RequestError(f"--{word} is for guests that are there, and not for dumps of them")


@contextmanager
def open_guest_of(
    path: str, arguments: argparse.Namespace, *, search_seconds: float = math.inf
) -> Iterator[StoredGuest]:
    """Open the guest in the dump that a command line names; tell what memory of it was lost.

    Raises:
        UnsupportedTargetError: Nothing tells of what guest it is.
        CorruptDumpError: The dump's headers or notes are damaged.
    """
    with open_source(path, arguments) as dump:
        guest = StoredGuest(dump, search_seconds=search_seconds, target=arguments.target)
        if (lost := guest.lost_in_words) is not None:
            tell(printable(f"incomplete: {lost}"))
        yield guest


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
