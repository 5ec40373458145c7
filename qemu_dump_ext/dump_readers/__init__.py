"""Open a dump of any format that we read."""

from __future__ import annotations

import os

from qemu_dump_ext.dump_readers._dump_file import DumpFile
from qemu_dump_ext.dump_readers._flattened_image import FlattenedImage, is_flattened
from qemu_dump_ext.dump_readers._image import DumpImage, PlainImage
from qemu_dump_ext.dump_readers.elf import ElfCoreFile, is_elf
from qemu_dump_ext.dump_readers.kdump import KdumpFile, is_kdump
from qemu_dump_ext.errors import NotADumpError

_HEAD_SIZE = 16


def open_dump(path: str | os.PathLike[str]) -> DumpFile:
    """Open a dump for reading; close it, or use it in a `with` statement.

    Raises:
        RequestError: The file cannot be opened, or is one part of a split dump.
        NotADumpError: It is of no format that we read.
        CorruptDumpError: It is, but its headers contradict the format or are cut off.
    """
    file = PlainImage(path)
    try:
        return _open_image(file, os.fspath(path))
    except BaseException:
        file.close()
        raise


def _open_image(file: DumpImage, path: str) -> DumpFile:
    image, suffix = file, ""
    head = file.read(0, min(_HEAD_SIZE, file.size))
    if is_flattened(head):
        image, suffix = FlattenedImage(file), "-flattened"
        head = image.read(0, min(_HEAD_SIZE, image.size))
    if is_elf(head):
        return ElfCoreFile(image, suffix)
    if is_kdump(head):
        return KdumpFile(image, suffix)
    inside = " inside its flattened stream" if suffix else ""
    raise NotADumpError(f"{path} is neither ELF nor kdump{inside}")
