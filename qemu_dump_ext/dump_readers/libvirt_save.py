"""Read libvirt's save image, as `virsh save` and `virsh managedsave` write it.

It is QEMU's migration stream behind a header and the XML of the domain; the stream may be packed.
"""

from __future__ import annotations

from qemu_dump_ext.dump_readers._declaration import DumpReader, Fit
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._unpacked_image import UnpackedImage
from qemu_dump_ext.dump_readers.migration import READER as MIGRATION
from qemu_dump_ext.dump_readers.migration import MigrationFile
from qemu_dump_ext.structures.libvirt_save import (
    SAVE_HEADER_SIZE,
    SAVE_MAGIC,
    UNFINISHED_MAGIC,
    SaveHeader,
    domain_of,
    parse_save_header,
)

_SPARSE = "sparse"
"""Where pages have their places in the file, by the capability mapped-ram."""


class LibvirtSaveFile(MigrationFile):
    """An open save image.

    Attributes:
        save_header: What libvirt's header tells.
        domain: Name and UUID, where the XML is well-formed.
    """

    def __init__(self, image: DumpImage, format_suffix: str = "") -> None:
        self.save_header = parse_save_header(image.read(0, SAVE_HEADER_SIZE))
        self.domain = domain_of(image.read(SAVE_HEADER_SIZE, self.save_header.xml_size))
        stream, place = _stream_of(image, self.save_header)
        if not self.save_header.finished:
            stream.problems = (*stream.problems, "libvirt has not finished this save image")
        if self.domain is None:
            stream.problems = (*stream.problems, "the XML of the domain is damaged")
        try:
            super().__init__(stream, format_suffix, place)
        except BaseException:
            if isinstance(stream, UnpackedImage):
                stream.forget()
            raise
        self.format = f"libvirt_save{format_suffix}"


def _stream_of(image: DumpImage, header: SaveHeader) -> tuple[DumpImage, int]:
    """Return what has the migration stream of an image, and its offset in there."""
    if header.packing is None or header.packing == _SPARSE:
        return image, header.stream_place
    return UnpackedImage(image, header.stream_place, header.packing), 0


READER = DumpReader(
    name="libvirt_save",
    probe=lambda head: Fit.SURE if head.startswith((SAVE_MAGIC, UNFINISHED_MAGIC)) else Fit.NO,
    open=LibvirtSaveFile,
    describe=lambda dump: {
        "domain": lambda: " ".join(dump.domain) if dump.domain else None,
        "packing": lambda: dump.save_header.packing,
        "was_running": lambda: dump.save_header.was_running,
        **MIGRATION.describe(dump),
    },
    verify=MIGRATION.verify,
)
