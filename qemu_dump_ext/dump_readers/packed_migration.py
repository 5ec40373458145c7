"""Read QEMU's migration stream, packed as a whole by gzip, bzip2, xz, lzop or zstd.

`virsh dump` without `--memory-only` writes such a file where libvirt's `dump_image_format` says so,
and `migrate` does through `exec:gzip`. What they write unpacked is the bare stream.
"""

from __future__ import annotations

from collections.abc import Mapping

from qemu_dump_ext.dump_readers._declaration import DumpReader, Fit
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._unpacked_image import UnpackedImage, unpacked_pieces
from qemu_dump_ext.dump_readers.migration import READER as MIGRATION
from qemu_dump_ext.dump_readers.migration import MigrationFile
from qemu_dump_ext.errors import NotADumpError
from qemu_dump_ext.structures.migration import MIGRATION_MAGIC

_MAGICS: Mapping[bytes, str] = {
    b"\x1f\x8b\x08": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x89LZO\0\r\n\x1a\n": "lzop",
}
_REFUSED_MAGICS: Mapping[bytes, str] = {
    b"\x04\x22\x4d\x18": "lz4",
}


def _packing_of(head: bytes, magics: Mapping[bytes, str]) -> str | None:
    return next((name for magic, name in magics.items() if head.startswith(magic)), None)


class PackedMigrationFile(MigrationFile):
    """An open migration stream that is packed.

    Attributes:
        packing: What has packed it.
    """

    def __init__(self, image: DumpImage, format_suffix: str = "") -> None:
        self.packing = _packing(image)
        unpacked = UnpackedImage(image, 0, self.packing)
        try:
            super().__init__(unpacked, format_suffix)
        except BaseException:
            unpacked.forget()
            raise
        self.format = f"packed_migration{format_suffix}"


def _packing(image: DumpImage) -> str:
    """Return what has packed a migration stream.

    Raises:
        NotADumpError: Something else is packed, or nothing that can be unpacked.
    """
    head = image.read(0, min(image.size, max(map(len, (*_MAGICS, *_REFUSED_MAGICS)))))
    packing = _packing_of(head, _MAGICS)
    if packing is None:
        raise NotADumpError(
            f"it is packed by {_packing_of(head, _REFUSED_MAGICS)}: unpack it first"
        )
    if not next(unpacked_pieces(image, 0, packing), b"").startswith(MIGRATION_MAGIC):
        raise NotADumpError(f"what {packing} has packed is no migration stream: unpack it first")
    return packing


def _probe(head: bytes) -> Fit:
    return Fit.MAYBE if _packing_of(head, {**_MAGICS, **_REFUSED_MAGICS}) else Fit.NO


READER = DumpReader(
    name="packed_migration",
    probe=_probe,
    open=PackedMigrationFile,
    describe=lambda dump: {"packing": lambda: dump.packing, **MIGRATION.describe(dump)},
    verify=MIGRATION.verify,
)
