"""Structures of the kdump-compressed format and of the flattened stream around it.

Source: makedumpfile diskdump_mod.h and IMPLEMENTATION; crash diskdump.h. The version behind a
member is the header_version that brought it.
"""

from __future__ import annotations

from qemu_dump_ext.structures.c_struct import Abi, Field, StructLayout, fields_of
from qemu_dump_ext.structures.utsname import UTSNAME_FIELDS, UTSNAME_SIZE

KDUMP_SIGNATURE = b"KDUMP   "
HEADER_VERSION = 6

DUMP_DH_COMPRESSED_ZLIB = 0x1
DUMP_DH_COMPRESSED_LZO = 0x2
DUMP_DH_COMPRESSED_SNAPPY = 0x4
DUMP_DH_COMPRESSED_INCOMPLETE = 0x8
DUMP_DH_EXCLUDED_VMEMMAP = 0x10
DUMP_DH_COMPRESSED_ZSTD = 0x20

DISK_DUMP_HEADER = StructLayout(
    "disk_dump_header",
    (
        Field("signature", "bytes", 8),
        Field("header_version", "s32"),
        *(Field(name, "bytes", UTSNAME_SIZE) for name in UTSNAME_FIELDS),
        *fields_of("ulong", "timestamp_sec timestamp_usec"),
        *fields_of("u32", "status"),
        *fields_of("s32", "block_size sub_hdr_size"),
        *fields_of("u32", "bitmap_blocks max_mapnr total_ram_blocks device_blocks written_blocks"),
        *fields_of("u32", "current_cpu"),
        Field("nr_cpus", "s32"),
    ),
)
KDUMP_SUB_HEADER = StructLayout(
    "kdump_sub_header",
    (
        Field("phys_base", "ulong"),
        Field("dump_level", "s32"),  # 1
        Field("split", "s32"),  # 2
        *fields_of("ulong", "start_pfn end_pfn"),  # 2, obsolete since 6
        Field("offset_vmcoreinfo", "u64"),  # 3
        Field("size_vmcoreinfo", "ulong"),  # 3
        Field("offset_note", "u64"),  # 4
        Field("size_note", "ulong"),  # 4
        Field("offset_eraseinfo", "u64"),  # 5
        Field("size_eraseinfo", "ulong"),  # 5
        *fields_of("u64", "start_pfn_64 end_pfn_64 max_mapnr_64"),  # 6
    ),
)
PAGE_DESCRIPTOR = StructLayout(
    "page_desc",
    (
        Field("offset", "s64"),
        *fields_of("u32", "size flags"),
        Field("page_flags", "u64"),
    ),
)
PAGE_DESCRIPTOR_SIZE = PAGE_DESCRIPTOR.bind(Abi("little", 8, 8)).size
"""Bytes, with all word sizes and byte orders."""
