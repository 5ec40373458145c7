"""The header of libvirt's save image: what stands before QEMU's migration stream in it.

A fixed header in the byte order of the host, the XML of the domain, and the stream, which may be
packed by a program of which the header has the number.

Source: libvirt src/qemu/qemu_saveimage.h, struct _virQEMUSaveHeader and virQEMUSaveFormat.
"""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree as ET

from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.printable import printable
from qemu_dump_ext.structures.c_struct import Abi, ByteOrder, Field, StructLayout, fields_of
from qemu_dump_ext.value import Value

SAVE_MAGIC = b"LibvirtQemudSave"
UNFINISHED_MAGIC = b"LibvirtQemudPart"
"""What libvirt writes first, and replaces when the stream is complete."""
SAVE_HEADER_SIZE = 92
XML_SIZE_MAX = 16 << 20

_WORD_MAX = 256
_VERSIONS = range(1, 3)
_FORMATS: Mapping[int, str | None] = {
    0: None,
    1: "gzip",
    2: "bzip2",
    3: "xz",
    4: "lzop",
    5: "zstd",
    6: "sparse",
}
_HEADER = StructLayout(
    "virQEMUSaveHeader",
    (
        Field("magic", "bytes", len(SAVE_MAGIC)),
        *fields_of("u32", "version data_len was_running format cookie_offset"),
        Field("unused", "bytes", 14 * 4),
    ),
)
_BYTE_ORDERS: tuple[ByteOrder, ...] = ("little", "big")


class SaveHeader(Value):
    """What the fixed header tells.

    Attributes:
        finished: libvirt has written all of the image.
        xml_size: Bytes of XML, and of what libvirt adds to it, behind the header.
        was_running: The domain ran before it was saved.
        packing: Name of the program that has packed the stream, or None.
    """

    finished: bool
    xml_size: int
    was_running: bool
    packing: str | None

    @property
    def stream_place(self) -> int:
        """Offset of the stream."""
        return SAVE_HEADER_SIZE + self.xml_size


def parse_save_header(data: bytes) -> SaveHeader:
    """Return what the first `SAVE_HEADER_SIZE` bytes of an image tell.

    Raises:
        CorruptDumpError: The version, the size of the XML or the packing is none of libvirt's.
    """
    for byte_order in _BYTE_ORDERS:
        fields = _HEADER.bind(Abi(byte_order, word_size=8, max_align=4)).unpack_integers(data)
        if fields["version"] in _VERSIONS:
            break
    else:
        version = int.from_bytes(data[16:20], "little")
        raise CorruptDumpError(
            f"libvirt's save image has version {version}, not {_VERSIONS[0]} to {_VERSIONS[-1]}"
        )
    if not 0 < fields["data_len"] <= XML_SIZE_MAX:
        raise CorruptDumpError(
            f"libvirt's save image has XML of {fields['data_len']:#x} bytes, not 1 to"
            f" {XML_SIZE_MAX:#x}"
        )
    if fields["format"] not in _FORMATS:
        raise CorruptDumpError(
            f"libvirt's save image is packed by program {fields['format']}, which is not known"
        )
    return SaveHeader(
        data.startswith(SAVE_MAGIC),
        fields["data_len"],
        bool(fields["was_running"]),
        _FORMATS[fields["format"]],
    )


def domain_of(xml: bytes) -> tuple[str, str] | None:
    """Return name and UUID of the domain that XML describes; None where it is not well-formed."""
    text = xml.partition(b"\0")[0]
    if b"<!DOCTYPE" in text:  # libvirt writes none, and its entities make much of little
        return None
    try:
        root = ET.fromstring(text)  # noqa: S314 - without entities
    except (ET.ParseError, ValueError, LookupError):
        return None
    # What is being migrated has the domain within it.
    domain = root if root.tag == "domain" else root.find("domain")
    if domain is None:
        return None
    name, uuid = (domain.findtext(key, "")[:_WORD_MAX].split() for key in ("name", "uuid"))
    return printable(" ".join(name)), printable(" ".join(uuid))
