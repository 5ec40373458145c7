"""The header that a driver in the guest left in the note of QEMU's vmcoreinfo device.

It is mended as QEMU does it: from the kernel's debugger data block (KDBG), and the registers of
the vCPUs are put where the kernel would have saved them. QEMU stores them in the guest for the
time of its dump; here only the file has them.

Source: QEMU dump/win_dump.c create_win_dump() and what it calls; messages are QEMU's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.printable import printable
from qemu_dump_ext.structures.c_struct import U32_MAX, U64_MAX
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.win_dmp import (
    CONTEXT_FLAGS,
    CONTEXT_FLOATING_POINT,
    CONTEXTS,
    HEADERS,
    LIVE_SYSTEM_DUMP,
    MOST_RUNS,
    NOTE_HEADER_SIZE,
    PAGE_SHIFT,
    SIGNATURE,
    VALID_DUMP,
    PageRun,
    WindowsDump,
    parse_runs,
)
from qemu_dump_ext.value import Value
from qemu_dump_ext.windows.system_memory import SystemMemory, WindowsGuest

OWNER_TAG = b"KDBG"
OWNER_TAG_OFFSET = 0x10
KI_BUGCHECK_DATA_OFFSET = 0x88
MM_PFN_DATABASE_OFFSET = 0xC0
KI_PROCESSOR_BLOCK_OFFSET = 0x218
PRCB_CONTEXT_OFFSET = 0x338
"""Offsets in KDBG, which has the same layout for 32 and 64 bits."""
_BUGCHECK_SIZES: Mapping[int, int] = {4: 20, 8: 40}
CONTEXT_SIZES: Mapping[int, int] = {4: 716, 8: 1232}
"""Of the kernel's structure, in bytes. QEMU's has 4 more in 32 bits, and overwrites them."""

_REGISTERS = frozenset(
    "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip eflags"
    " cs_selector ds_selector es_selector fs_selector gs_selector ss_selector"
    " dr0 dr1 dr2 dr3 dr6 dr7 mxcsr".split()
)
_FLOATING_POINT = (
    *("fcw", "fsw", "ftw"),
    *(f"fpr{number}" for number in range(8)),
    *(f"xmm{number}" for number in range(16)),
)
_NO_DRIVER = (
    "the driver fwcfg of virtio-win leaves the header of such a dump in QEMU's device vmcoreinfo"
)


class DumpHeader(Value):
    """A header under way.

    Attributes:
        word_size: The size of a pointer, in bytes.
        data: The bytes, which change.
    """

    word_size: int
    data: bytearray

    def __getitem__(self, name: str) -> int:
        return HEADERS[self.word_size].unpack_integers(memoryview(self.data))[name]

    def __setitem__(self, name: str, value: int) -> None:
        layout = HEADERS[self.word_size]
        size = layout.truncate(name, U64_MAX).bit_length() // 8
        self.put(name, layout.truncate(name, value).to_bytes(size, "little"))

    def put(self, name: str, data: bytes) -> None:
        """Overwrite what begins with a member."""
        start = HEADERS[self.word_size].offsets[name]
        self.data[start : start + len(data)] = data

    def runs(self, dialect: Dialect) -> list[PageRun]:
        """Return the physical memory runs.

        Args:
            dialect: Of the dump; QEMU reads on behind the array.

        Raises:
            RequestError: There are more than a header has room for.
        """
        offsets = HEADERS[self.word_size].offsets
        end = len(self.data) if dialect.windows_as_qemu else offsets["ContextBuffer"]
        count = self["NumberOfRuns"]
        runs = parse_runs(bytes(self.data[offsets["Run"] : end]), self.word_size, count)
        if len(runs) < count:
            raise RequestError(
                f"win-dump: invalid header: {count} physical memory runs, and there is room for"
                f" {MOST_RUNS[self.word_size]}"
            )
        return runs


def header_of_note(guest: WindowsGuest, note: bytes, dialect: Dialect) -> WindowsDump:
    """Return the dump that the driver's header describes.

    Args:
        guest: Stands still.
        note: From the vmcoreinfo device; empty where there is none.
        dialect: How the dump is spelt.

    Raises:
        RequestError: There is no such header, or what it leads to is not there.
        SourceError: Memory, or a register that page tables need, cannot be had.
    """
    header = _header_in(note, dialect)
    memory = guest.system_memory(header["DirectoryTableBase"])
    header["KdDebuggerDataBlock"] = _find_kdbg(header, memory)
    doubts = tuple(_mend(header, memory, dialect))
    missing, more = store_contexts(header, guest, memory, dialect)
    return WindowsDump(
        word_size=header.word_size,
        header=bytes(header.data),
        runs=tuple(header.runs(dialect)),
        patches=tuple(memory.patches),
        missing=missing,
        doubts=(*doubts, *more),
    )


def _header_in(note: bytes, dialect: Dialect) -> DumpHeader:
    """Return the header in a note; QEMU does not look where the descriptor begins."""
    if not note and dialect.names_missing_note:
        raise RequestError("win-dump: no vmcoreinfo note from the guest", hint=_NO_DRIVER)
    data = bytearray(note[NOTE_HEADER_SIZE:])
    if len(data) not in {layout.size for layout in HEADERS.values()}:
        raise RequestError("win-dump: invalid vmcoreinfo note size", hint=_NO_DRIVER)
    if data[:4] != SIGNATURE:
        raise RequestError(f"win-dump: invalid header, expected 'PAGE', got '{_text(data[:4])}'")
    valid = bytes(data[4:8])
    for word_size, wanted in VALID_DUMP.items():
        if valid == wanted:
            # Of a note of the other size, QEMU reads behind the end, or leaves some out.
            if len(data) < HEADERS[word_size].size:
                raise RequestError("win-dump: invalid vmcoreinfo note size")
            return DumpHeader(word_size, data[: HEADERS[word_size].size])
    raise RequestError(f"win-dump: invalid header, expected 'DUMP' or 'DU64', got '{_text(valid)}'")


def _text(data: bytes | bytearray) -> str:
    return printable(bytes(data).partition(b"\0")[0].decode("ascii", "backslashreplace"))


def _find_kdbg(header: DumpHeader, memory: SystemMemory) -> int:
    # Where the kernel keeps its own encoded, the driver tells of a decoded copy.
    tag = b""
    for name in ("KdDebuggerDataBlock", "BugcheckParameter1"):
        address = header[name]
        found = memory.read((address + OWNER_TAG_OFFSET) & U64_MAX, len(OWNER_TAG))
        if found is None:
            raise RequestError("win-dump: failed to read OwnerTag")
        if found == OWNER_TAG:
            return address
        tag = found
    raise RequestError(f"win-dump: invalid KDBG OwnerTag, expected 'KDBG', got '{_text(tag)}'")


def _mend(header: DumpHeader, memory: SystemMemory, dialect: Dialect) -> list[str]:
    """Correct what drivers get wrong; return what could not be."""
    size = len(header.data) + (header["NumberOfPages"] << PAGE_SHIFT)
    if header.word_size == 8:
        header["RequiredDumpSpace"] = size
        header["unused"] = header["unused1"] = 0
    elif dialect.windows_as_qemu:
        header.put("RequiredDumpSpace", (size & U32_MAX).to_bytes(4, "little"))
    else:
        header["RequiredDumpSpace"] = size
    kdbg, doubts = header["KdDebuggerDataBlock"], []
    word = header.word_size
    database, whole = memory.read_some(kdbg + MM_PFN_DATABASE_OFFSET, word)
    if whole or dialect.windows_as_qemu:
        header.put("PfnDatabase", database)
    if not whole:
        doubts.append("win-dump: failed to read MmPfnDatabase")
    if failure := put_bugcheck_data(header, memory, dialect):
        doubts.append(failure)
    return doubts


def put_bugcheck_data(header: DumpHeader, memory: SystemMemory, dialect: Dialect) -> str | None:
    """Put in the header why the guest crashed, or that it has not; return what failed, or None."""
    word = header.word_size
    address = memory.read_integer(header["KdDebuggerDataBlock"] + KI_BUGCHECK_DATA_OFFSET, word)
    if address is None:
        return "win-dump: failed to read KiBugcheckData"
    data, whole = memory.read_some(address, _BUGCHECK_SIZES[word])
    if whole or dialect.windows_as_qemu:
        header.put("BugcheckCode", data)
    if not whole:
        return "win-dump: failed to read bugcheck data"
    if not header["BugcheckCode"]:
        header["BugcheckCode"] = LIVE_SYSTEM_DUMP
    return None


def store_contexts(
    header: DumpHeader, guest: WindowsGuest, memory: SystemMemory, dialect: Dialect
) -> tuple[dict[tuple[str, int], list[str]], list[str]]:
    """Store the registers of each vCPU where its processor block says.

    Returns:
        Registers that no source gave, by structure and cpu_index, and what could not be had.

    Raises:
        RequestError: There is no such place.
    """
    missing: dict[tuple[str, int], list[str]] = {}
    count, word = header["NumberProcessors"], header.word_size
    vcpus = guest.vcpus[:count]
    # What has been stored may lie over where the next one is told.
    for number, place in enumerate(context_places(header, memory, len(vcpus))):
        data, absent = encode_context(vcpus[number], word, dialect)
        if absent:
            missing["CONTEXT", vcpus[number].index] = absent
        if not dialect.windows_as_qemu:
            data = data[: CONTEXT_SIZES[word]]
        if not memory.store(place, data):
            raise RequestError(f"win-dump: failed to save CPU #{number} context")
    doubts = []
    if count < len(guest.vcpus):
        doubts.append(
            f"win-dump: number of QEMU CPUs is bigger than NumberProcessors ({count}) in guest"
            " Windows"
        )
    return missing, doubts


def context_places(header: DumpHeader, memory: SystemMemory, count: int) -> Iterator[int]:
    """Yield where the kernel saves the registers of each processor.

    Args:
        header: Of the dump.
        memory: At the kernel's addresses.
        count: Of processors.

    Raises:
        RequestError: There is no such place.
    """
    word, kdbg = header.word_size, header["KdDebuggerDataBlock"]
    blocks = memory.read_integer(kdbg + KI_PROCESSOR_BLOCK_OFFSET, word)
    if blocks is None:
        raise RequestError("win-dump: failed to read KiProcessorBlock")
    offset = memory.read_integer(kdbg + PRCB_CONTEXT_OFFSET, 2)
    if offset is None:
        raise RequestError("win-dump: failed to read OffsetPrcbContext")
    for number in range(count):
        block = memory.read_integer(blocks + number * word, word)
        if block is None:
            raise RequestError(f"win-dump: failed to read CPU #{number} PRCB location")
        context = memory.read_integer(block + offset, word)
        if context is None:
            raise RequestError(f"win-dump: failed to read CPU #{number} ContextFrame location")
        yield context


def decode_context(data: bytes, word_size: int) -> Mapping[str, int]:
    """Return the registers in a CONTEXT, but for those of x87 and SSE.

    Args:
        data: `CONTEXT_SIZES` bytes.
        word_size: The size of a pointer, in bytes.
    """
    layout = CONTEXTS[word_size]
    values = layout.unpack_integers(data.ljust(layout.size, b"\0"))
    return {name: value for name, value in values.items() if name in _REGISTERS}


def encode_context(vcpu: Vcpu, word_size: int, dialect: Dialect) -> tuple[bytes, list[str]]:
    """Return a CONTEXT with the registers of a vCPU, and the names of those that are not known.

    QEMU says that those of x87 and SSE are in it, and leaves them zero. Here they are, or it says
    that they are not.
    """
    layout = CONTEXTS[word_size]
    names = [name for name in layout.offsets if name in _REGISTERS]
    known = {name: vcpu.registers[name] for name in names if name in vcpu.registers}
    values = {name: layout.truncate(name, value) for name, value in known.items()}
    flags = CONTEXT_FLAGS[word_size]
    if flags & CONTEXT_FLOATING_POINT:
        values["FltSave_MxCsr"] = values.get("mxcsr", 0)
        if not dialect.windows_as_qemu:
            floating_point = _floating_point(vcpu.registers)
            values |= floating_point
            if not floating_point:
                flags &= ~CONTEXT_FLOATING_POINT
    values["ContextFlags"] = flags
    return layout.pack(**values), [name for name in names if name not in known]


def _floating_point(registers: Mapping[str, int]) -> Mapping[str, int]:
    """Return what FXSAVE would store; empty where not all of it is known."""
    state = {name: registers[name] for name in _FLOATING_POINT if name in registers}
    if len(state) < len(_FLOATING_POINT):
        return {}
    top = state["fsw"] >> 11 & 7
    stack = {f"st{number}": state.pop(f"fpr{(top + number) % 8}") for number in range(8)}
    return state | stack
