"""Find the Windows kernel in a guest's memory, and make the header of a dump of what it tells.

Where no driver in the guest has left a header, the handler of interrupt 0 leads into the kernel's
image, and its debugger data block (KDBG) is in that. Since Windows 8, a 64-bit kernel that has not
crashed keeps it encoded, with keys that are found by debug symbols. They are not needed: each word
is encoded as

    word' = rotate_right(byteswap(word ^ KEY) ^ ANOTHER_KEY, r) ^ A_THIRD_KEY

so the keys are gone from the difference of two encoded words: of the owner tag and the base of the
image, which are known, there are 64 possible differences for each size of the block. Where two
neighbours have one, that is the block, and one known word decodes all others.

Sources:
    QEMU contrib/elf2dmp/main.c (the way through the IDT, fix_dtb(), kdbg_decode(), fill_header()),
    kdbg.h; Microsoft PE format; for KUSER_SHARED_DATA, Windows' ntddk.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import partial
from itertools import islice, pairwise
from typing import Self

from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.guest.model import Vcpu
from qemu_dump_ext.structures.c_struct import U32_MAX, U64_MAX
from qemu_dump_ext.structures.dialect import Dialect
from qemu_dump_ext.structures.win_dmp import (
    DUMP_TYPE_FULL,
    HEADERS,
    LIVE_SYSTEM_DUMP,
    MACHINE_IMAGE_TYPES,
    MOST_RUNS,
    PAGE_SHIFT,
    PAGE_SIZE,
    SIGNATURE,
    VALID_DUMP,
    PageRun,
    WindowsDump,
    encode_runs,
    parse_runs,
)
from qemu_dump_ext.value import Value
from qemu_dump_ext.windows.dump_header import (
    KI_PROCESSOR_BLOCK_OFFSET,
    MM_PFN_DATABASE_OFFSET,
    OWNER_TAG,
    OWNER_TAG_OFFSET,
    PRCB_CONTEXT_OFFSET,
    DumpHeader,
    encode_context,
    put_bugcheck_data,
    store_contexts,
)
from qemu_dump_ext.windows.system_memory import SystemMemory, WindowsGuest

_SHARED_USER_DATA: Mapping[int, int] = {4: 0xFFDF0000, 8: 0xFFFFF78000000000}
"""Where every Windows has the page that it shares with programs, by the size of a pointer."""
_INTERRUPT_TIME, _SYSTEM_TIME, _PRODUCT_TYPE, _SUITE_MASK = 0x08, 0x14, 0x264, 0x2D0
_PCR_KERNEL_TABLES = 0x7000
"""Where a processor's control region has the tables that are used in the kernel, if programs have
others."""
_PAE_TABLE_SIZE = 32
"""Bytes; other tables take a page."""
_TABLE_BITS = 0x000FFFFFFFFFFFE0
"""Bits of CR3 that are an address."""
_CR4_PAE = 1 << 5

_IMAGE_MAX = 32 << 20
_BELOW_HANDLER_MAX = 32 << 20
"""Bytes of which the kernel's image, or what of it is below that handler, has fewer."""
_CANDIDATES_MAX = 4096
"""Of what is looked for in an image that a hostile guest has filled with it."""
_HANDLERS_MAX = 4
"""Of different vCPUs, below which an image is looked for."""
_OPTIONAL_MAGIC: Mapping[int, int] = {4: 0x10B, 8: 0x20B}
_KDBG_SIZE_OFFSET, _KERN_BASE_OFFSET = 0x14, 0x18
_LOADED_MODULES_OFFSET, _ACTIVE_PROCESSES_OFFSET = 0x48, 0x50
_PHYSICAL_MEMORY_BLOCK_OFFSET = 0x270
_KDBG_SIZES = range(PRCB_CONTEXT_OFFSET + 8, 0x400, 8)
"""Bytes; since Windows 7, from which on KDBG tells where registers are saved."""
_VERSION_BLOCK = struct.Struct("<HHxBxxH14xQ8x")
"""MajorVersion, MinorVersion, KdSecondaryVersion, MachineType, PsLoadedModuleList."""
_VERSION_BASE_OFFSET = 0x10
"""Of KernBase in it."""
_COMMENT = b"Made by qemu_dump_ext of the debugger data block in memory."


class _Kernel(Value):
    """A kernel that was found.

    Attributes:
        memory: At its addresses.
        vcpu: Which led to it.
        table_base: Of its page tables.
        word_size: The size of a pointer, in bytes.
        base: Address of its image.
        size: Of its image, in bytes.
        image: The bytes of it.
    """

    memory: SystemMemory
    vcpu: Vcpu
    table_base: int
    word_size: int
    base: int
    size: int
    image: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Read the image; what is not mapped is zero."""
        pages = (
            self.memory.read(self.base + offset, PAGE_SIZE) or bytes(PAGE_SIZE)
            for offset in range(0, self.size, PAGE_SIZE)
        )
        object.__setattr__(self, "image", b"".join(pages))

    def places_of(self, pattern: bytes) -> Iterator[int]:
        """Yield the addresses of a pattern in its image, but of a hostile image not all."""
        position = self.image.find(pattern)
        for _ in range(_CANDIDATES_MAX):
            if position < 0:
                return
            yield self.base + position
            position = self.image.find(pattern, position + 1)

    def has(self, address: int) -> bool:
        """Tell whether an address is in its image."""
        return self.base <= address < self.base + self.size


class _Kdbg(Value):
    """The kernel's debugger data block.

    Attributes:
        address: Of it.
        data: Decoded.
        is_encoded: In memory.
    """

    address: int
    data: bytes
    is_encoded: bool

    def pointer(self, offset: int, word_size: int) -> int:
        """Return a pointer in it."""
        return int.from_bytes(self.data[offset : offset + word_size], "little")


def header_of_kernel(guest: WindowsGuest, dialect: Dialect) -> WindowsDump:
    """Return the dump of a guest of which its kernel alone tells.

    Raises:
        RequestError: There is no such kernel, or it does not tell enough.
        SourceError: Memory cannot be read.
    """
    kernel = _find_kernel(guest)
    kdbg = _find_kdbg(kernel)
    memory, word = kernel.memory, kernel.word_size
    if kdbg.is_encoded and not memory.store(kdbg.address, kdbg.data):
        raise RequestError(f"KDBG at {kdbg.address:#x} is not all in memory")
    version = _find_version(kernel, kdbg)
    layout = HEADERS[word]
    runs, of_kernel = _physical_memory(guest, memory, kdbg, word)
    pages = sum(run.count for run in runs)
    shared = memory.read(_SHARED_USER_DATA[word], PAGE_SIZE) or bytes(PAGE_SIZE)
    count = _processor_count(memory, kdbg, word, len(guest.vcpus))
    values: dict[str, int | bytes] = {
        "Signature": SIGNATURE,
        "ValidDump": VALID_DUMP[word],
        "MajorVersion": version.major,
        "MinorVersion": version.build,
        "DirectoryTableBase": kernel.table_base,
        "PfnDatabase": memory.read_integer(kdbg.pointer(MM_PFN_DATABASE_OFFSET, word), word) or 0,
        "PsLoadedModuleList": kdbg.pointer(_LOADED_MODULES_OFFSET, word),
        "PsActiveProcessHead": kdbg.pointer(_ACTIVE_PROCESSES_OFFSET, word),
        "MachineImageType": MACHINE_IMAGE_TYPES[word],
        "NumberProcessors": count,
        "BugcheckCode": LIVE_SYSTEM_DUMP,
        "KdDebuggerDataBlock": kdbg.address & (1 << 8 * word) - 1,
        "NumberOfRuns": len(runs),
        "NumberOfPages": pages,
        "Run": encode_runs(runs, word),
        "ContextBuffer": encode_context(kernel.vcpu, word, dialect)[0],
        "DumpType": DUMP_TYPE_FULL,
        "RequiredDumpSpace": layout.size + (pages << PAGE_SHIFT),
        "SystemTime": _time(shared, _SYSTEM_TIME),
        "SystemUpTime": _time(shared, _INTERRUPT_TIME),
        "Comment": _COMMENT,
        "ProductType": int.from_bytes(shared[_PRODUCT_TYPE:][:4], "little"),
        "SuiteMask": int.from_bytes(shared[_SUITE_MASK:][:4], "little"),
        "KdSecondaryVersion": version.secondary,
    }
    if "PaeEnabled" in layout.offsets:
        values["PaeEnabled"] = int(bool(kernel.vcpu.registers["cr4"] & _CR4_PAE))
    header = DumpHeader(word, bytearray(layout.pack(**values)))
    doubts = [*filter(None, [put_bugcheck_data(header, memory, dialect)])]
    missing, more = store_contexts(header, guest, memory, dialect)
    return WindowsDump(
        word_size=word,
        header=bytes(header.data),
        runs=runs,
        patches=tuple(memory.patches),
        missing=missing,
        remarks=(_told(kernel, kdbg, version.build, of_kernel=of_kernel),),
        doubts=(*doubts, *more),
    )


def _told(kernel: _Kernel, kdbg: _Kdbg, build: int, *, of_kernel: bool) -> str:
    encoded = ", decoded" if kdbg.is_encoded else ""
    memory = "what it lists" if of_kernel else "all RAM of the machine"
    return (
        f"the header was made of the kernel at {kernel.base:#x} (build {build}) and its KDBG at"
        f" {kdbg.address:#x}{encoded}; physical memory is {memory}"
    )


def _time(shared: bytes, offset: int) -> int:
    # KSYSTEM_TIME: the low part, then the high one.
    return int.from_bytes(shared[offset : offset + 8], "little")


def _find_kernel(guest: WindowsGuest) -> _Kernel:
    """Return the kernel to which the IDT of a vCPU leads."""
    reasons: list[str] = []
    handlers: set[int] = set()
    for vcpu in guest.vcpus:
        try:
            found = _Entry.of(guest, vcpu)
            if found.handler in handlers or len(handlers) >= _HANDLERS_MAX:
                continue
            handlers.add(found.handler)
            return found.kernel()
        except (RequestError, SourceError) as error:
            reasons.append(f"vCPU {vcpu.index}: {error.message}")
    raise RequestError(f"there is no Windows kernel in memory: {'; '.join(reasons[:4])}")


class _Entry(Value):
    """How a vCPU enters the kernel.

    Attributes:
        memory: At the kernel's addresses.
        vcpu: Which.
        table_base: Of the kernel's page tables.
        word_size: The size of a pointer, in bytes.
        handler: Address of the handler of interrupt 0.
    """

    memory: SystemMemory
    vcpu: Vcpu
    table_base: int
    word_size: int
    handler: int

    @classmethod
    def of(cls, guest: WindowsGuest, vcpu: Vcpu) -> Self:
        """Find it by the registers of a vCPU.

        Raises:
            RequestError: They do not lead to a kernel of Windows.
            SourceError: No source gives one of them.
        """
        registers = vcpu.registers
        if not {"cr3", "idt_base"} <= registers.keys():
            raise SourceError("no source gives CR3 and the base of the IDT")
        table_base = registers["cr3"]
        memory = guest.system_memory(table_base, vcpu)
        word = memory.pointer_size
        if word is None:
            raise RequestError("it has no page tables")
        shared = _SHARED_USER_DATA[word]
        if memory.read(shared, 1) is None and word == 8:
            # It runs a program, which does not have the kernel in its tables.
            region = registers.get("kernel_gs_base", 0)
            table_base = memory.read_integer(region + _PCR_KERNEL_TABLES, word) or table_base
            memory = guest.system_memory(table_base, vcpu)
        if memory.read(shared, 1) is None:
            raise RequestError(
                f"nothing is mapped at {shared:#x}, where Windows has data for all programs"
            )
        handler = _handler(memory, registers["idt_base"], word)
        if handler is None:
            raise RequestError("its IDT is not mapped")
        granule = PAGE_SIZE if word == 8 else _PAE_TABLE_SIZE
        return cls(memory, vcpu, table_base & -granule & _TABLE_BITS, word, handler)

    def kernel(self) -> _Kernel:
        """Return the kernel around the handler.

        Raises:
            RequestError: There is no image.
        """
        image = _image_below(self.memory, self.handler, self.word_size)
        if image is None:
            raise RequestError(f"no image of a kernel is around its handler at {self.handler:#x}")
        return _Kernel(self.memory, self.vcpu, self.table_base, self.word_size, *image)


def _handler(memory: SystemMemory, idt: int, word_size: int) -> int | None:
    """Return the address of the handler of interrupt 0."""
    gate = memory.read(idt, 2 * word_size)
    if gate is None:
        return None
    high = gate[6:12] if word_size == 8 else gate[6:8]
    return int.from_bytes(gate[:2] + high, "little")


def _image_below(memory: SystemMemory, address: int, word_size: int) -> tuple[int, int] | None:
    """Return base and size of the executable image around an address."""
    page = address & -PAGE_SIZE
    for base in range(page, max(page - _BELOW_HANDLER_MAX, 0), -PAGE_SIZE):
        if memory.read(base, 2) != b"MZ":
            continue
        size = _image_size(memory, base, word_size)
        if size is not None and address < base + size:
            return base, size
    return None


def _image_size(memory: SystemMemory, base: int, word_size: int) -> int | None:
    """Return the size of an executable image in bytes, or None where it is none of this width."""
    offset = memory.read_integer(base + 0x3C, 4)
    if offset is None or offset >= PAGE_SIZE:
        return None
    head = memory.read(base + offset, 24 + 60)
    if head is None or head[:4] != b"PE\0\0":
        return None
    machine, magic = (int.from_bytes(head[at : at + 2], "little") for at in (4, 24))
    size = int.from_bytes(head[24 + 56 : 24 + 60], "little")
    fits = machine == MACHINE_IMAGE_TYPES[word_size] and magic == _OPTIONAL_MAGIC[word_size]
    return size if fits and PAGE_SIZE <= size <= _IMAGE_MAX else None


def _find_kdbg(kernel: _Kernel) -> _Kdbg:
    """Return the debugger data block in a kernel's image."""
    candidates = map(partial(_plain_kdbg, kernel), kernel.places_of(OWNER_TAG))
    found = next(filter(None, candidates), None)
    if found is None and kernel.word_size == 8:
        places = islice(_encoded_places(kernel), _CANDIDATES_MAX)
        encoded = (_encoded_kdbg(kernel, *place) for place in places)
        found = next(filter(None, encoded), None)
    if found is None:
        raise RequestError(
            f"the kernel at {kernel.base:#x} has no KDBG in memory that tells where registers are"
            " saved, as Windows 7 and newer have"
        )
    return found


def _plain_kdbg(kernel: _Kernel, tag: int) -> _Kdbg | None:
    address = tag - OWNER_TAG_OFFSET
    size = kernel.memory.read_integer(address + _KDBG_SIZE_OFFSET, 4)
    if size is None or size not in _KDBG_SIZES:
        return None
    data = kernel.memory.read(address, size)
    return None if data is None else _checked(kernel, _Kdbg(address, data, is_encoded=False))


def _checked(kernel: _Kernel, kdbg: _Kdbg) -> _Kdbg | None:
    """Return what is of this kernel; None for anything else."""
    word = kernel.word_size
    if kdbg.pointer(_KERN_BASE_OFFSET, word) != kernel.base:
        return None
    inside = (_LOADED_MODULES_OFFSET, _ACTIVE_PROCESSES_OFFSET, KI_PROCESSOR_BLOCK_OFFSET)
    return kdbg if all(kernel.has(kdbg.pointer(offset, word)) for offset in inside) else None


def _differences(base: int) -> dict[int, tuple[int, int]]:
    """Return size and rotation of an encoded block by the difference of two of its words."""
    found: dict[int, tuple[int, int]] = {}
    for size in _KDBG_SIZES:
        tag = int.from_bytes(OWNER_TAG + size.to_bytes(4, "little"), "little")
        difference = _swapped(tag ^ base)
        for rotation in range(64):
            found[_rotated(difference, -rotation)] = size, rotation
    return found


def _encoded_places(kernel: _Kernel) -> Iterator[tuple[int, int, int]]:
    """Yield address, size and rotation of what has two neighbours as an encoded block has."""
    differences = _differences(kernel.base)
    words = struct.iter_unpack("<Q", kernel.image)
    for index, ((one,), (other,)) in enumerate(pairwise(words)):
        if one ^ other in differences:
            yield kernel.base + 8 * index - OWNER_TAG_OFFSET, *differences[one ^ other]


def _encoded_kdbg(kernel: _Kernel, address: int, size: int, rotation: int) -> _Kdbg | None:
    data = kernel.memory.read(address, size)
    if data is None:
        return None
    words = struct.unpack(f"<{size // 8}Q", data)
    known = words[_KERN_BASE_OFFSET // 8]
    decoded = (kernel.base ^ _swapped(_rotated(word ^ known, rotation)) for word in words)
    block = struct.pack(f"<{size // 8}Q", *decoded)
    return _checked(kernel, _Kdbg(address, block, is_encoded=True))


def _rotated(value: int, bits: int) -> int:
    """Return 64 bits rotated to the left."""
    bits %= 64
    return (value << bits | value >> (64 - bits)) & U64_MAX


def _swapped(value: int) -> int:
    """Return 64 bits with the order of their bytes turned round."""
    return int.from_bytes(value.to_bytes(8, "little"), "big")


class _Version(Value):
    """What KdVersionBlock tells.

    Attributes:
        major: 15, or 12 of a checked build.
        build: Number of the build.
        secondary: KdSecondaryVersion.
    """

    major: int
    build: int
    secondary: int


def _find_version(kernel: _Kernel, kdbg: _Kdbg) -> _Version:
    """Return what the kernel calls itself, by the block that has the same two pointers as KDBG."""
    word, mask = kernel.word_size, (1 << 8 * kernel.word_size) - 1
    modules = kdbg.pointer(_LOADED_MODULES_OFFSET, word)
    for place in kernel.places_of(kernel.base.to_bytes(word, "little")):
        block = kernel.memory.read(place - _VERSION_BASE_OFFSET, _VERSION_BLOCK.size)
        if block is None:
            continue
        major, build, secondary, machine, told = _VERSION_BLOCK.unpack(block)
        if machine == MACHINE_IMAGE_TYPES[word] and told & mask == modules:
            return _Version(major, build, secondary)
    raise RequestError(
        f"the kernel at {kernel.base:#x} does not tell its version: KdVersionBlock is not in memory"
    )


def _processor_count(memory: SystemMemory, kdbg: _Kdbg, word_size: int, most: int) -> int:
    blocks = kdbg.pointer(KI_PROCESSOR_BLOCK_OFFSET, word_size)
    for number in range(most):
        if not memory.read_integer(blocks + number * word_size, word_size):
            return number
    return most


def _physical_memory(
    guest: WindowsGuest, memory: SystemMemory, kdbg: _Kdbg, word_size: int
) -> tuple[tuple[PageRun, ...], bool]:
    """Return the runs that the kernel lists, and True; or what RAM there is, and False."""
    listed = _listed_memory(memory, kdbg, word_size)
    ends = [block.end for block in guest.ram_blocks]
    if listed and listed[-1].gpa + listed[-1].size <= ends[-1]:
        return listed, True
    runs: list[PageRun] = []
    for block in guest.ram_blocks:
        first, end = -(-block.gpa // PAGE_SIZE), block.end >> PAGE_SHIFT
        if runs and runs[-1].first + runs[-1].count >= first:
            first = runs.pop().first
        if first < end:
            runs.append(PageRun(first, end - first))
    if len(runs) > MOST_RUNS[word_size] or (word_size == 4 and ends[-1] >> PAGE_SHIFT > U32_MAX):
        raise RequestError("the guest's memory is in too many parts for the header of a dump")
    return tuple(runs), False


def _listed_memory(memory: SystemMemory, kdbg: _Kdbg, word_size: int) -> tuple[PageRun, ...] | None:
    """Return the runs of MmPhysicalMemoryBlock, or None where they are not those of a guest."""
    variable = kdbg.pointer(_PHYSICAL_MEMORY_BLOCK_OFFSET, word_size)
    address = memory.read_integer(variable, word_size)
    if not address:
        return None
    count = memory.read_integer(address, 4)
    total = memory.read_integer(address + word_size, word_size)
    if count is None or not 0 < count <= MOST_RUNS[word_size]:
        return None
    data = memory.read(address + 2 * word_size, 2 * word_size * count)
    runs = tuple(parse_runs(data or b"", word_size, count))
    ascends = all(
        one.count and one.first + one.count <= other.first for one, other in pairwise(runs)
    )
    fits = len(runs) == count and ascends and sum(run.count for run in runs) == total
    return runs if fits else None
