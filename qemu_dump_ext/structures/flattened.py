"""Structures of makedumpfile's flattened stream.

Source: makedumpfile's `makedumpfile.h`, struct makedumpfile_header and makedumpfile_data_header.
"""

from __future__ import annotations

from qemu_dump_ext.structures.c_struct import Abi, Field, StructLayout, fields_of

FLATTENED_SIGNATURE = b"makedumpfile"
FLATTENED_HEADER_SIZE = 4096
FLATTENED_TYPE = 1
FLATTENED_VERSION = 1
FLATTENED_ABI = Abi("big", word_size=8, max_align=8)
"""Integers of the flattened stream are big-endian whatever the dump is."""


FLATTENED_HEADER = StructLayout(
    "makedumpfile_header",
    (Field("signature", "bytes", 16), *fields_of("s64", "type version")),
)


FLATTENED_CHUNK = StructLayout("makedumpfile_data_header", fields_of("s64", "offset buf_size"))
FLATTENED_END = -1
