"""A guest that Windows could have left behind: its structures in memory, and its processors' mode.

No Windows is needed: pages of memory and page tables are made by hand, stored through qtest, and
the header of the dump is handed to QEMU's vmcoreinfo device as a driver in the guest does it.
Addresses of the kernel's data are contiguous, the pages behind them are not.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.doors import run_gdb
from tests.support.page_tables import LONG, PAE, PG
from tests.support.qtest import Qtest, qtest_arguments

PAGE = 4096
MEMORY_MIB = 16
VCPUS = 2
_PAGES_AT = 0x300000
"""Pages are handed out from here on."""
NOTE_AT = 0x200000
_DMA_HIGH, _DMA_LOW = 0x514, 0x518
_DMA_AT = 0x180000
_FILE_DIRECTORY = 0x19
_READ, _SELECT, _WRITE = 2, 8, 16
_ELF_FORMAT = 1
_CODE_64, _DATA, _CODE_32 = 0x00209B0000000000, 0x00CF93000000FFFF, 0x00CF9B000000FFFF

KDBG_AT, BUGCHECK_AT, BLOCKS_AT, PRCB_AT, CONTEXT_AT = 0xE00, 0x2FF0, 0x4000, 0x5000, 0x10D00
"""Where in the kernel's data: KDBG, bugcheck data and contexts cross the border of pages."""
DATA_SIZE = 0x20000
PRCB_CONTEXT = 0x6A8
KERNEL_DATA = {8: 0xFFFFF80212340000, 4: 0x82940000}
"""Its address, by the size of a pointer."""
SHARED_USER_DATA = {8: 0xFFFFF78000000000, 4: 0xFFDF0000}
CODE_SIZE = 0x40000
"""Of the kernel's image, in front of its data."""
BUILD, SYSTEM_TIME, UP_TIME = 19041, 0x01DA0123456789AB, 0x123456789A
RUNS = ((0x1, 0x9E), (0x100, 0x200), (0x300, 0xCFF))
_HEADER_FIELDS: Mapping[int, Mapping[str, tuple[int, str]]] = {
    8: {
        "MinorVersion": (0xC, "I"),
        "DirectoryTableBase": (0x10, "Q"),
        "PfnDatabase": (0x18, "Q"),
        "MachineImageType": (0x30, "I"),
        "NumberProcessors": (0x34, "I"),
        "BugcheckCode": (0x38, "I"),
        "BugcheckParameter1": (0x40, "Q"),
        "KdDebuggerDataBlock": (0x80, "Q"),
        "NumberOfRuns": (0x88, "I"),
        "NumberOfPages": (0x90, "Q"),
        "Run": (0x98, "Q"),
        "DumpType": (0xF98, "I"),
        "RequiredDumpSpace": (0xFA0, "Q"),
        "SystemTime": (0xFA8, "Q"),
        "SystemUpTime": (0x1030, "Q"),
        "ProductType": (0x1040, "I"),
        "SuiteMask": (0x1044, "I"),
    },
    4: {
        "MinorVersion": (0xC, "I"),
        "DirectoryTableBase": (0x10, "I"),
        "PfnDatabase": (0x14, "I"),
        "MachineImageType": (0x20, "I"),
        "NumberProcessors": (0x24, "I"),
        "BugcheckCode": (0x28, "I"),
        "BugcheckParameter1": (0x2C, "I"),
        "KdDebuggerDataBlock": (0x60, "I"),
        "NumberOfRuns": (0x64, "I"),
        "NumberOfPages": (0x68, "I"),
        "Run": (0x6C, "I"),
        "DumpType": (0xF88, "I"),
        "RequiredDumpSpace": (0xFA0, "Q"),
        "SystemTime": (0xFC0, "Q"),
        "SystemUpTime": (0xFB8, "Q"),
        "ProductType": (0xF94, "I"),
        "SuiteMask": (0xF98, "I"),
    },
}
HEADER_SIZES = {8: 8192, 4: 4096}
_VALID_DUMP = {8: b"DU64", 4: b"DUMP"}
_MACHINES = {8: 0x8664, 4: 0x14C}
CONTEXT_SIZES = {8: 1232, 4: 716}


class WindowsImage:
    """Guest memory with what Windows keeps there; tests change it before it is planted.

    Attributes:
        word_size: The size of a pointer, in bytes.
        pae: Page tables of 32 bits have entries of 8 bytes.
        header: Of the dump, as the driver leaves it.
        note: What is around the header: name, and sizes if they are to be wrong.
        pages: Guest memory by gpa of each page.
        root: Of the page tables.
        base: Address of the kernel's data.
        kernel_base: Address of its image, where there is one.
    """

    kernel_base = 0
    cr3 = 0
    kernel_gs_base = 0
    rip: int | None = None
    eflags = 0x246

    def __init__(self, word_size: int = 8, *, pae: bool = True) -> None:
        self.word_size = word_size
        self.pae = pae
        self.pages: dict[int, bytearray] = {}
        self._next_page = _PAGES_AT
        self._random = random.Random(word_size)  # noqa: S311
        self.root = self.new_page()
        self.note = note_of(b"")
        self.map(0, 0, PAGE)
        for index, descriptor in enumerate((0, 0, _CODE_64, _DATA, _CODE_32)):
            self.put(8 * index, struct.pack("<Q", descriptor))
        self.base = KERNEL_DATA[word_size]
        places = [self.new_page(self._random.randbytes(PAGE)) for _ in range(DATA_SIZE // PAGE)]
        for index, gpa in enumerate(reversed(places)):
            self.map(self.base + index * PAGE, gpa, PAGE)
        self._fill_kernel_data()
        self.header = self._make_header()

    def new_page(self, content: bytes = b"") -> int:
        """Return the gpa of a page that nothing else uses."""
        gpa, self._next_page = self._next_page, self._next_page + PAGE
        self.pages[gpa] = bytearray(content.ljust(PAGE, b"\0"))
        return gpa

    def put(self, gpa: int, data: bytes) -> None:
        """Store bytes in guest physical memory."""
        for index, byte in enumerate(data):
            page = self.pages.setdefault((gpa + index) & -PAGE, bytearray(PAGE))
            page[(gpa + index) % PAGE] = byte

    def map(self, gva: int, gpa: int, size: int) -> None:
        """Map pages."""
        for offset in range(0, size, PAGE):
            table, index, entry_size = self.last_table(gva + offset)
            self.put(table + index * entry_size, (gpa + offset | 1).to_bytes(entry_size, "little"))

    def unmap(self, gva: int) -> None:
        """Map a page no more."""
        table, index, entry_size = self.last_table(gva)
        self.put(table + index * entry_size, bytes(entry_size))

    def gpa_of(self, gva: int) -> int:
        """Return where an address is mapped to."""
        table, index, entry_size = self.last_table(gva)
        entry = self._integer(table + index * entry_size, entry_size)
        return (entry & 0x000FFFFFFFFFF000) + gva % PAGE

    def _integer(self, gpa: int, size: int) -> int:
        page = self.pages[gpa & -PAGE]
        return int.from_bytes(page[gpa % PAGE :][:size], "little")

    def last_table(self, gva: int) -> tuple[int, int, int]:
        """Return the table of the last level, the index of an entry, and the size of entries."""
        entry_size = 8 if self.word_size == 8 or self.pae else 4
        shifts: tuple[int, ...] = (39, 30, 21, 12) if self.word_size == 8 else (30, 21, 12)
        if entry_size == 4:
            shifts = (22, 12)
        mask = PAGE // entry_size - 1
        table = self.root
        for shift in shifts[:-1]:
            place = table + (gva >> shift & mask) * entry_size
            entry = self._integer(place, entry_size)
            if not entry:
                entry = self.new_page() | 1
                self.put(place, entry.to_bytes(entry_size, "little"))
            table = entry & -PAGE
        return table, gva >> 12 & mask, entry_size

    def store(self, offset: int, data: bytes) -> None:
        """Store bytes in the kernel's data."""
        for index, byte in enumerate(data):
            self.put(self.gpa_of(self.base + offset + index), bytes([byte]))

    def add_kernel(self, *, keys: tuple[int, int, int] | None = None) -> None:
        """Add the image of a kernel that has its data at the end, the IDT, and the shared page.

        Args:
            keys: With which KDBG is encoded; None: it is not.
        """
        wide = self.word_size == 8
        header = bytearray(PAGE)
        header[:2] = b"MZ"
        struct.pack_into("<I", header, 0x3C, 0x100)
        struct.pack_into("<4sH", header, 0x100, b"PE", _MACHINES[self.word_size])
        struct.pack_into("<H", header, 0x118, 0x20B if wide else 0x10B)
        struct.pack_into("<I", header, 0x118 + 56, CODE_SIZE + DATA_SIZE)
        self.kernel_base = self.base - CODE_SIZE
        self.map(self.kernel_base, self.new_page(bytes(header)), PAGE)
        # Pages in between are not mapped, and one begins as an image does.
        self.map(self.base - PAGE, self.new_page(b"MZ"), PAGE)
        self.put_handler(self.base + 0x1234)
        self.map(SHARED_USER_DATA[self.word_size], self.new_page(), PAGE)
        self.put(self.gpa_of(SHARED_USER_DATA[self.word_size]), _shared_user_data())
        pointers = {
            0x18: self.kernel_base,
            0x48: self.base + 0x3100,
            0x50: self.base + 0x3200,
            0x270: self.base + 0x3300,
        }
        for offset, value in pointers.items():
            self.store_pointer(KDBG_AT + offset, value)
        self.store_pointer(0x3300, self.base + 0x3400)
        self.list_memory(RUNS)
        version = (0xF, BUILD, 0, 7, 0, _MACHINES[self.word_size], self.kernel_base)
        self.store(0x3800, struct.pack("<HHBBHH6xQQQ", *version, self.base + 0x3100, 0))
        if not wide:
            # Above a 32-bit address, there is its sign.
            for offset in (0x3814, 0x381C):
                self.store(offset, b"\xff" * 4)
        if keys is not None:
            self.encode_kdbg(*keys)

    def run_program(self) -> None:
        """Have the processors run a program, whose page tables lack the kernel but for its entry.

        They have the IDT, and the region of the processor, which tells where the others are.
        """
        region = self.base - 0x100000
        kernel_tables, self.root = self.root, self.new_page()
        self.map(0, 0, PAGE)
        tables = self.new_page(kernel_tables.to_bytes(8, "little") + bytes(PAGE - 8))
        self.map(region + 0x7000, tables, PAGE)
        self.cr3, self.root = self.root, kernel_tables
        self.kernel_gs_base = region

    def spin(self) -> None:
        """Have the processors, once they run, stay where they are, without interrupts."""
        self.store(0x3E00, b"\xeb\xfe")
        self.rip, self.eflags = self.base + 0x3E00, 0x46

    def put_handler(self, address: int) -> None:
        """Have the IDT, which is at 0, lead somewhere."""
        low, middle, high = address & 0xFFFF, address >> 16 & 0xFFFF, address >> 32
        gate = struct.pack("<HHHH", low, 0x10, 0x8E00, middle)
        self.put(0, gate + (struct.pack("<II", high, 0) if self.word_size == 8 else b""))

    def list_memory(self, runs: Sequence[tuple[int, int]]) -> None:
        """Have the kernel list physical memory."""
        self.store_pointer(0x3400, len(runs))
        self.store_pointer(0x3400 + self.word_size, sum(count for _, count in runs))
        for index, run in enumerate(runs):
            for number, value in enumerate(run):
                self.store_pointer(0x3400 + self.word_size * (2 + 2 * index + number), value)

    def encode_kdbg(self, never: int, always: int, encoded: int) -> None:
        """Encode KDBG as the kernel does it.

        Args:
            never: KiWaitNever.
            always: KiWaitAlways.
            encoded: Address of KdpDataBlockEncoded.
        """
        size = 0x340
        head = struct.pack("<QQ", self.base + 0x3900, self.base + 0x3900)
        self.store(KDBG_AT, head)
        words = struct.unpack(f"<{size // 8}Q", self.read(KDBG_AT, size))
        self.store(KDBG_AT, b"".join(_encoded(word, never, always, encoded) for word in words))

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the kernel's data."""
        places = (self.gpa_of(self.base + offset + index) for index in range(size))
        return bytes(self.pages[gpa & -PAGE][gpa % PAGE] for gpa in places)

    def store_pointer(self, offset: int, value: int) -> None:
        """Store a pointer in the kernel's data."""
        self.store(offset, value.to_bytes(self.word_size, "little"))

    def _fill_kernel_data(self) -> None:
        self.store(KDBG_AT + 0x10, b"KDBG" + struct.pack("<I", 0x340))
        self.store_pointer(KDBG_AT + 0x88, self.base + BUGCHECK_AT)
        self.store_pointer(KDBG_AT + 0xC0, 0xFFFFFA8000000000 >> (64 - 8 * self.word_size))
        self.store_pointer(KDBG_AT + 0x218, self.base + BLOCKS_AT)
        self.store(KDBG_AT + 0x338, struct.pack("<H", PRCB_CONTEXT))
        self.store(BUGCHECK_AT, bytes(40))
        for number in range(VCPUS):
            prcb = PRCB_AT + number * PAGE
            self.store_pointer(BLOCKS_AT + number * self.word_size, self.base + prcb)
            self.store_pointer(prcb + PRCB_CONTEXT, self.base + self.context_at(number))

    def context_at(self, number: int) -> int:
        """Return where in the kernel's data the context of a processor is."""
        return CONTEXT_AT + number * 2 * PAGE

    def crash(self, code: int, *parameters: int) -> None:
        """Have the guest crashed."""
        letter = "Q" if self.word_size == 8 else "I"
        self.store(BUGCHECK_AT, struct.pack(f"<{1 + len(parameters)}{letter}", code, *parameters))

    def _make_header(self) -> bytearray:
        size = HEADER_SIZES[self.word_size]
        self.header = bytearray(b"PAGE" * (size // 4))
        self.header[4:8] = _VALID_DUMP[self.word_size]
        self.set("DirectoryTableBase", self.root)
        self.set("MachineImageType", _MACHINES[self.word_size])
        self.set("NumberProcessors", VCPUS)
        self.set("KdDebuggerDataBlock", self.base + KDBG_AT)
        self.set("DumpType", 1)
        self.set_runs(RUNS)
        return self.header

    def set(self, name: str, value: int) -> None:
        """Change a member of the header."""
        offset, letter = _HEADER_FIELDS[self.word_size][name]
        struct.pack_into(f"<{letter}", self.header, offset, value)

    def set_runs(self, runs: Sequence[tuple[int, int]]) -> None:
        """Change the physical memory runs: first page and count of each."""
        offset, letter = _HEADER_FIELDS[self.word_size]["Run"]
        self.set("NumberOfRuns", len(runs))
        self.set("NumberOfPages", sum(count for _, count in runs))
        for index, run in enumerate(runs):
            struct.pack_into(f"<2{letter}", self.header, offset + 2 * self.word_size * index, *run)

    def file_offset(self, gpa: int) -> int:
        """Return where a full dump has the memory at an address."""
        offset = HEADER_SIZES[self.word_size]
        for first, count in RUNS:
            if first * PAGE <= gpa < (first + count) * PAGE:
                return offset + gpa - first * PAGE
            offset += count * PAGE
        raise KeyError(gpa)

    def modes(self) -> Mapping[str, int]:
        """Return the registers that decide how addresses are translated."""
        cr4 = PAE if self.word_size == 8 or self.pae else 0
        efer = LONG if self.word_size == 8 else 0
        return {"efer": efer, "cr4": cr4, "cr3": self.cr3 or self.root, "cr0": 0x60000011 | PG}


def _encoded(word: int, never: int, always: int, encoded: int) -> bytes:
    # The other way round: byteswap, and bits rotated to the right.
    value = int.from_bytes((word ^ always).to_bytes(8, "little"), "big") ^ encoded
    bits = (never & 0xFF) % 64
    value = (value >> bits | value << (64 - bits)) & (1 << 64) - 1
    return (value ^ never).to_bytes(8, "little")


def _shared_user_data() -> bytes:
    page = bytearray(0x300)
    struct.pack_into("<QI", page, 0x08, UP_TIME, 0)
    struct.pack_into("<QI", page, 0x14, SYSTEM_TIME, 0)
    struct.pack_into("<I", page, 0x264, 3)
    struct.pack_into("<I", page, 0x2D0, 0x110)
    return bytes(page)


def header_field(header: bytes, word_size: int, name: str) -> int:
    """Read a member of a header."""
    offset, letter = _HEADER_FIELDS[word_size][name]
    (value,) = struct.unpack_from(f"<{letter}", header, offset)
    return int(value)


def note_of(descriptor: bytes, name: bytes = b"VMCOREINFO\0") -> bytes:
    """Return an ELF note, which has its descriptor 24 bytes behind its beginning."""
    head = struct.pack("<III", len(name), len(descriptor), 0)
    return head + name + bytes(-len(name) % 4) + descriptor + bytes(-len(descriptor) % 4)


class WindowsMachine(QemuMachine):
    """A machine whose vCPUs never run, and into whose memory images are planted one by one."""

    qtest_socket: Path
    _modes: Mapping[str, int] | None = None

    def plant(self, image: WindowsImage, note: bytes | None = None) -> None:
        """Store an image in guest memory, and hand its header over.

        Args:
            image: What to store.
            note: Other than that with the image's header; empty: none.
        """
        note = note_of(bytes(image.header)) if note is None else note
        with Qtest(self.qtest_socket) as qtest:
            for gpa, page in image.pages.items():
                qtest.write(gpa, bytes(page))
            if note:
                qtest.write(NOTE_AT, note)
            hand_over(qtest, NOTE_AT, len(note))
        if self._modes != image.modes():
            self._set_registers(image)
            self._modes = image.modes()

    def _set_registers(self, image: WindowsImage) -> None:
        long = image.word_size == 8
        code = 0x10 if long else 0x20
        segments = {18: code, 19: 0x18, 20: 0x18, 21: 0x18, 22: 0x18, 23: 0x18}
        controls = {"cr0": 27, "cr3": 29, "cr4": 30, "efer": 32}
        general = range(16 if long else 8)
        commands = []
        for number in range(VCPUS):
            values = {27: 0x60000010, 30: 0, 32: 0}
            modes = image.modes()
            packets = [*values.items(), *((controls[name], modes[name]) for name in modes)]
            # The stub loads a segment whose selector changes, and nothing else.
            packets += [(18, 0x18), *segments.items()]
            packets += [(26, image.kernel_gs_base)]
            packets += [(index, register_value(number, index, long=long)) for index in general]
            rip = register_value(number, 16, long=long) if image.rip is None else image.rip
            packets += [(16, rip), (17, image.eflags + number)]
            packets += [(65, 0x1F80 + number), (41, 0x27F), (42, 0x3800)]
            packets += [(33 + index, floating_value(number, index)) for index in range(8)]
            vectors = range(16 if long else 8)
            packets += [(49 + index, vector_value(number, index)) for index in vectors]
            commands.append(f"maintenance packet Hgp1.{number + 1}")
            for register, value in packets:
                content = value.to_bytes(_packet_size(register), "little").hex()
                commands.append(f"maintenance packet P{register:x}={content}")
        done = run_gdb(self, commands)
        assert done.stdout.count('received: "OK"') == len(commands), done.stdout + done.stderr


def register_value(vcpu: int, index: int, *, long: bool) -> int:
    """Return what a general register of a vCPU is set to, by its number in the stub."""
    value = 0xABCD000000000000 | vcpu << 40 | index << 32 | 0x80001000 + index
    return value if long else value & 0xFFFFFFFF


def floating_value(vcpu: int, index: int) -> int:
    """Return what a register of the x87 of a vCPU is set to, by its place in memory."""
    return 0x4000 << 64 | 0x8000 << 48 | vcpu << 8 | index


def vector_value(vcpu: int, index: int) -> int:
    """Return what a register of SSE of a vCPU is set to."""
    return 0x1122334455667788 << 64 | 0xAABBCCDD00000000 | vcpu << 8 | index


def _packet_size(register: int) -> int:
    # Those of x87 have 10 bytes, its control registers and MXCSR 4, those of SSE 16.
    if 33 <= register < 49:
        return 10 if register < 41 else 4
    return 8 if register < 33 else 16 if register < 65 else 4


def hand_over(qtest: Qtest, gpa: int, size: int, *, guest_format: int = _ELF_FORMAT) -> None:
    """Tell QEMU's vmcoreinfo device where a note is, through fw_cfg as a guest does it.

    Source: QEMU docs/specs/fw_cfg.rst, docs/specs/vmcoreinfo.rst.
    """
    place = dict(_files(qtest))["etc/vmcoreinfo"]
    found = struct.pack("<HHIQ", _ELF_FORMAT, guest_format if size else 0, size, gpa)
    qtest.write(_DMA_AT + 64, found)
    _transfer(qtest, place << 16 | _SELECT | _WRITE, len(found))


def _files(qtest: Qtest) -> Iterator[tuple[str, int]]:
    _transfer(qtest, _FILE_DIRECTORY << 16 | _SELECT | _READ, 4)
    count = int.from_bytes(qtest.read(_DMA_AT + 64, 4), "big")
    _transfer(qtest, _FILE_DIRECTORY << 16 | _SELECT | _READ, 4 + 64 * count)
    entries = qtest.read(_DMA_AT + 68, 64 * count)
    for offset in range(0, len(entries), 64):
        _, select, _, name = struct.unpack_from(">IHH56s", entries, offset)
        yield name.partition(b"\0")[0].decode(), select


def _transfer(qtest: Qtest, control: int, size: int) -> None:
    qtest.write(_DMA_AT, struct.pack(">IIQ", control, size, _DMA_AT + 64))
    for port, value in ((_DMA_HIGH, _DMA_AT >> 32), (_DMA_LOW, _DMA_AT & 0xFFFFFFFF)):
        # The registers are big-endian.
        qtest.ask(f"outl {port:#x} {int.from_bytes(value.to_bytes(4, 'little'), 'big'):#x}")
    assert qtest.read(_DMA_AT, 4) == bytes(4), "the transfer failed"


@contextmanager
def windows_machine(
    command: Sequence[str], folder: Path, arguments: Sequence[str] = ("-m", str(MEMORY_MIB))
) -> Iterator[WindowsMachine]:
    """Keep a machine for Windows images running for the time of a `with` block.

    Args:
        command: QEMU.
        folder: For its socket.
        arguments: How much memory it has, and more.
    """
    socket = folder / "qtest"
    common = ["-smp", str(VCPUS), "-device", "vmcoreinfo", *qtest_arguments(socket)]
    machine = WindowsMachine(command, ["-S", *common, *arguments])
    machine.qtest_socket = socket
    with machine:
        yield machine
