"""The crash dump of Windows: its headers, and those structures of the kernel that go with it.

A file is a header of one or two pages, then the pages of the physical memory runs that the header
lists (`DUMP_TYPE_FULL`), or a bitmap of pages and those that it has (`DUMP_TYPE_BITMAP_FULL`).

Sources:
    QEMU include/qemu/win_dump_defs.h (WinDumpHeader32, WinDumpHeader64, WinContext32,
    WinContext64, offsets in KDBG), contrib/elf2dmp/kdbg.h (KDDEBUGGER_DATA64,
    DBGKD_GET_VERSION64); for the bitmap, and for what QEMU does not name of the 32-bit header,
    Volatility 3 symbols/windows/crash.json, crash64.json and crash_common.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field

from qemu_dump_ext.structures.c_struct import Abi, BoundStruct, Field, StructLayout, fields_of
from qemu_dump_ext.value import Value

PAGE_SIZE = 4096
PAGE_SHIFT = 12
SIGNATURE = b"PAGE"
VALID_DUMP: Mapping[int, bytes] = {4: b"DUMP", 8: b"DU64"}
"""By the size of a pointer, in bytes."""
DUMP_TYPE_FULL = 1
DUMP_TYPE_BITMAP_FULL = 5
LIVE_SYSTEM_DUMP = 0x161
"""The bugcheck code of a guest that has not crashed."""
MACHINE_IMAGE_TYPES: Mapping[int, int] = {4: 0x14C, 8: 0x8664}
SUMMARY_SIGNATURE, SUMMARY_VALID_DUMP = b"FDMP", b"DUMP"

NOTE_HEADER_SIZE = 24
"""Bytes in front of the header in the note of QEMU's vmcoreinfo device."""

_BUGCHECK = "BugcheckCode BugcheckParameter1 BugcheckParameter2 BugcheckParameter3"
_HEADER32 = StructLayout(
    "DUMP_HEADER32",
    (
        Field("Signature", "bytes", 4),
        Field("ValidDump", "bytes", 4),
        *fields_of("u32", "MajorVersion MinorVersion DirectoryTableBase PfnDatabase"),
        *fields_of("u32", "PsLoadedModuleList PsActiveProcessHead MachineImageType"),
        *fields_of("u32", f"NumberProcessors {_BUGCHECK} BugcheckParameter4"),
        Field("VersionUser", "bytes", 32),
        *fields_of("u8", "PaeEnabled KdSecondaryVersion"),
        Field("VersionUser2", "bytes", 2),
        *fields_of("u32", "KdDebuggerDataBlock NumberOfRuns NumberOfPages"),
        Field("Run", "bytes", 692),
        Field("ContextBuffer", "bytes", 1200),
        Field("Exception", "bytes", 80),
        Field("Comment", "bytes", 128),
        Field("reserved1", "bytes", 1768),
        *fields_of("u32", "DumpType MiniDumpFields SecondaryDataState ProductType SuiteMask"),
        Field("WriterStatus", "u32"),
        Field("RequiredDumpSpace", "u64"),
        Field("reserved2", "bytes", 16),
        *fields_of("u64", "SystemUpTime SystemTime"),
        Field("reserved3", "bytes", 56),
    ),
).bind(Abi("little", 4, 1))
_HEADER64 = StructLayout(
    "DUMP_HEADER64",
    (
        Field("Signature", "bytes", 4),
        Field("ValidDump", "bytes", 4),
        *fields_of("u32", "MajorVersion MinorVersion"),
        *fields_of("u64", "DirectoryTableBase PfnDatabase PsLoadedModuleList PsActiveProcessHead"),
        *fields_of("u32", "MachineImageType NumberProcessors BugcheckCode unused0"),
        *fields_of("u64", "BugcheckParameter1 BugcheckParameter2 BugcheckParameter3"),
        Field("BugcheckParameter4", "u64"),
        Field("VersionUser", "bytes", 32),
        Field("KdDebuggerDataBlock", "u64"),
        *fields_of("u32", "NumberOfRuns unused"),
        Field("NumberOfPages", "u64"),
        Field("Run", "bytes", 688),
        Field("ContextBuffer", "bytes", 3000),
        Field("Exception", "bytes", 152),
        *fields_of("u32", "DumpType unused1"),
        *fields_of("u64", "RequiredDumpSpace SystemTime"),
        Field("Comment", "bytes", 128),
        Field("SystemUpTime", "u64"),
        *fields_of("u32", "MiniDumpFields SecondaryDataState ProductType SuiteMask WriterStatus"),
        *fields_of("u8", "unused2 KdSecondaryVersion"),
        Field("reserved", "bytes", 4018),
    ),
).bind(Abi("little", 8, 1))
HEADERS: Mapping[int, BoundStruct] = {4: _HEADER32, 8: _HEADER64}
"""By the size of a pointer, in bytes."""
_RUN = {
    size: StructLayout("PHYSICAL_MEMORY_RUN", fields_of("ulong", "BasePage PageCount")).bind(
        Abi("little", size, 1)
    )
    for size in (4, 8)
}
MOST_RUNS: Mapping[int, int] = {4: 86, 8: 43}
"""As many as the field of the header has room for, by the size of a pointer."""

SUMMARY = StructLayout(
    "SUMMARY_DUMP",
    (
        Field("Signature", "bytes", 4),
        Field("ValidDump", "bytes", 4),
        Field("DumpOptions", "u32"),
        Field("reserved", "bytes", 20),
        *fields_of("u64", "HeaderSize Pages BitmapSize"),
    ),
).bind(Abi("little", 8, 1))
"""Behind the header of a bitmap dump, and followed by the bitmap, LSB first: where pages begin in
the file, how many there are, and how many bits the bitmap has."""

_CONTEXT32 = StructLayout(
    "CONTEXT32",
    (
        *fields_of("u32", "ContextFlags dr0 dr1 dr2 dr3 dr6 dr7"),
        Field("FloatSave", "bytes", 112),
        *fields_of("u32", "gs_selector fs_selector es_selector ds_selector"),
        *fields_of("u32", "rdi rsi rbx rdx rcx rax rbp rip cs_selector eflags rsp ss_selector"),
        Field("ExtendedRegisters", "bytes", 512),
        Field("padding", "bytes", 4),
    ),
).bind(Abi("little", 4, 4))
_CONTEXT64 = StructLayout(
    "CONTEXT64",
    (
        Field("PHome", "bytes", 48),
        *fields_of("u32", "ContextFlags mxcsr"),
        *fields_of("u16", "cs_selector ds_selector es_selector fs_selector gs_selector"),
        Field("ss_selector", "u16"),
        Field("eflags", "u32"),
        *fields_of("u64", "dr0 dr1 dr2 dr3 dr6 dr7"),
        *fields_of("u64", "rax rcx rdx rbx rsp rbp rsi rdi"),
        *fields_of("u64", "r8 r9 r10 r11 r12 r13 r14 r15 rip"),
        *fields_of("u16", "fcw fsw"),
        Field("ftw", "u8"),
        Field("FltSave_pointers", "bytes", 19),
        *fields_of("u32", "FltSave_MxCsr FltSave_MxCsr_Mask"),
        *(Field(f"st{number}", "wide", 16) for number in range(8)),
        *(Field(f"xmm{number}", "wide", 16) for number in range(16)),
        Field("FltSave_reserved", "bytes", 96),
        Field("VectorRegister", "bytes", 416),
        *fields_of("u64", "VectorControl DebugControl LastBranchToRip LastBranchFromRip"),
        *fields_of("u64", "LastExceptionToRip LastExceptionFromRip"),
    ),
).bind(Abi("little", 8, 8))
CONTEXTS: Mapping[int, BoundStruct] = {4: _CONTEXT32, 8: _CONTEXT64}
"""What the kernel saves of a processor, by the size of a pointer. Members that are named like
registers hold them."""
CONTEXT_FLAGS: Mapping[int, int] = {4: 0x10017, 8: 0x10001F}
"""Which registers are said to be in it, as QEMU says it."""
CONTEXT_FLOATING_POINT = 8
"""Of these flags: those of x87 and SSE."""


class PageRun(Value):
    """Consecutive pages of the guest's physical memory.

    Attributes:
        first: Number of the first one.
        count: How many.
    """

    first: int
    count: int

    @property
    def gpa(self) -> int:
        """First guest physical address."""
        return self.first << PAGE_SHIFT

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count << PAGE_SHIFT


def parse_runs(data: bytes, word_size: int, count: int) -> list[PageRun]:
    """Return the first `count` runs of an array, or as many as there are in `data`."""
    run = _RUN[word_size]
    whole = data[: min(count, len(data) // run.size) * run.size]
    return [PageRun(first, pages) for first, pages in run.codec.iter_unpack(whole)]


def is_windows_note(note: bytes) -> bool:
    """Tell whether a note of QEMU's vmcoreinfo device has the header of a Windows dump."""
    signature, valid = note[NOTE_HEADER_SIZE:][:4], note[NOTE_HEADER_SIZE + 4 :][:4]
    sizes = {NOTE_HEADER_SIZE + layout.size for layout in HEADERS.values()}
    return len(note) in sizes and signature == SIGNATURE and valid in VALID_DUMP.values()


def encode_runs(runs: Sequence[PageRun], word_size: int) -> bytes:
    """Return the array of runs of a header."""
    return b"".join(_RUN[word_size].codec.pack(run.first, run.count) for run in runs)


class WindowsDump(Value):
    """What a Windows dump has besides the guest's memory as it is.

    Attributes:
        word_size: The size of a pointer, in bytes.
        header: Of the file, complete.
        runs: The physical memory in the file, in order.
        patches: What the file has instead of the guest's memory: gpa and bytes, in the order in
            which they were laid over it.
        missing: Registers that no source gave, by structure and cpu_index.
        remarks: What the user should know.
        doubts: What could not be had, or found out.
    """

    word_size: int
    header: bytes
    runs: tuple[PageRun, ...]
    patches: tuple[tuple[int, bytes], ...] = ()
    missing: Mapping[tuple[str, int], Sequence[str]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
