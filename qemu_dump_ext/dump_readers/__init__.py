"""One file for each format of a dump that is read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from qemu_dump_ext.discovery import collect
from qemu_dump_ext.dump_readers._declaration import HEAD_SIZE, LISTED_MAX, DumpReader, Fit
from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers._flattened_image import FlattenedImage, is_flattened
from qemu_dump_ext.dump_readers._image import DumpImage, PlainImage
from qemu_dump_ext.dump_readers._parts import is_part, join_parts
from qemu_dump_ext.dump_readers._verify_report import OrderedPool, Progress, VerifyReport
from qemu_dump_ext.dump_readers.qcow2 import open_snapshot
from qemu_dump_ext.dump_readers.raw import open_by_kernel, open_by_layout
from qemu_dump_ext.errors import (
    AnothersDumpError,
    CorruptDumpError,
    NotADumpError,
    RequestError,
)

__all__ = [
    "LISTED_MAX",
    "DumpFile",
    "DumpReader",
    "Fit",
    "OrderedPool",
    "Progress",
    "VerifyReport",
    "all_dump_readers",
    "open_dump",
    "reader_of",
]


@cache
def all_dump_readers() -> dict[str, DumpReader[Any]]:
    """Return every reader by name."""
    return collect(sys.modules[__name__], "READER", DumpReader)


def reader_of(dump: DumpFile) -> DumpReader[Any]:
    """Return what has opened a dump."""
    return all_dump_readers()[dump.reader]


def open_dump(
    path: str | os.PathLike[str],
    *parts: str | os.PathLike[str],
    layout: str | None = None,
    snapshot_name: str | None = None,
) -> DumpFile:
    """Open a dump for reading; close it, or use it in a `with` statement.

    Args:
        path: The file; told apart by its content.
        parts: The other files of a dump that was split into several.
        layout: How the RAM that the file is without any headers lies, as `raw.parse_layout` takes
            it; None: the file tells what it is.
        snapshot_name: Name or ID of the snapshot in a qcow2 image; None: it has one alone.

    Raises:
        RequestError: The file cannot be opened, or is one part of a split dump without the others.
        NotADumpError: It is of no format that we read; says why, as far as it looks like one.
        CorruptDumpError: It is, but its headers contradict the format or are cut off.
    """
    if layout is not None:
        if parts:
            raise RequestError("--layout is for one file of RAM, and not for parts of a dump")
        return _open_file(path, lambda image: open_by_layout(image, layout))
    if snapshot_name is not None:
        return _open_file(path, lambda image: open_snapshot(image, snapshot_name))
    first = _open_file(path)
    if not parts and not is_part(first):
        return first
    files = [first]
    try:
        for part in parts:
            files.append(_open_file(part))  # noqa: PERF401 - those that are open are closed
        return join_parts(files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _open_file(
    path: str | os.PathLike[str], open_image: Callable[[DumpImage], DumpFile] | None = None
) -> DumpFile:
    file = PlainImage(path)
    try:
        return open_image(file) if open_image else _open_image(file)
    except CorruptDumpError as error:
        file.close()
        raise type(error)(f"{os.fspath(path)}: {error.message}", hint=error.hint) from error
    except BaseException:
        file.close()
        raise


def _open_image(file: DumpImage) -> DumpFile:
    if not file.size:
        raise NotADumpError("an empty file is no dump")
    image, suffix = file, ""
    head = file.read(0, min(HEAD_SIZE, file.size))
    if is_flattened(head):
        image, suffix = FlattenedImage(file), "-flattened"
        head = image.read(0, min(HEAD_SIZE, image.size))
    reasons: list[NotADumpError] = []
    damage: CorruptDumpError | None = None
    for reader, fit in _candidates(head):
        try:
            dump: DumpFile = reader.open(image, suffix)
        except NotADumpError as error:
            reasons.append(error)
        except CorruptDumpError as error:
            if fit is Fit.SURE:
                raise
            damage = damage or error
        else:
            dump.reader = reader.name
            return dump
    if damage is not None:
        raise damage
    inside = " inside its flattened stream" if suffix else ""
    if reasons:
        raise NotADumpError(f"no dump of a format that is read{inside}: {_in_words(reasons)}")
    try:
        return open_by_kernel(file)
    except NotADumpError as error:
        raise NotADumpError(
            f"it begins like no format that is read{inside}, and {error.message}",
            hint=f"read are {', '.join(all_dump_readers())}; RAM without headers by --layout",
        ) from error


def _candidates(head: bytes) -> Iterator[tuple[DumpReader[Any], Fit]]:
    """Yield who may read a dump, the surest first."""
    fits = [(reader, reader.probe(head)) for reader in all_dump_readers().values()]
    for reader, fit in sorted(fits, key=lambda one: -one[1]):
        if fit is not Fit.NO:
            yield reader, fit


def _in_words(reasons: Sequence[NotADumpError]) -> str:
    """Say why a file is no dump: what readers say of it, but for those who leave it to others."""
    own = [error for error in reasons if not isinstance(error, AnothersDumpError)]
    return "; ".join(dict.fromkeys(error.message for error in own or reasons))
