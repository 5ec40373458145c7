"""The log of a Linux kernel, as `dmesg` shows it, from guest memory. Pure but for the reader.

Every address, size and offset comes from VMCOREINFO, and every number from guest memory: all are
bounded, and a record that contradicts itself is cut or left out.

Source: Linux kernel/printk/printk_ringbuffer.c (since 5.10), kernel/printk/printk.c (struct
printk_log, 3.11 to 5.9; struct log before); Documentation/admin-guide/kdump/vmcoreinfo.rst; the
text of a line is that of makedumpfile --dump-dmesg.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.structures.vmcoreinfo import vmcoreinfo_number
from qemu_dump_ext.value import Value

_LOG_SIZE_MAX = 1 << 26
"""Bytes of text: twice what a kernel can be built with."""
_COUNT_BITS_MAX = 21
"""Of records: those of a log of that size."""
_PIECE_SIZE = 1 << 20
_STRUCT_SIZE_MAX = 4096
_COMMITTED, _FINALIZED = 1, 2
_STATE_BITS = 2
_PRINTABLE = frozenset(range(0x20, 0x7F)) | frozenset(b"\t\v\f\r")

ReadKernel = Callable[[int, int], bytes]
"""Gets a kernel address and a size; raises SourceError where there is no memory."""


class LogRecord(Value):
    """One message.

    Attributes:
        nanoseconds: Since the boot.
        text: The text as it was printed.
    """

    nanoseconds: int
    text: bytes

    def line(self) -> str:
        """Return it as makedumpfile prints it, without the last newline."""
        seconds, rest = divmod(self.nanoseconds, 1_000_000_000)
        stamp = f"[{seconds:5}.{rest // 1000:06}] "
        following = "\n" + " " * len(stamp)
        return stamp + "".join(
            following if byte == 0x0A else chr(byte) if byte in _PRINTABLE else f"\\x{byte:02x}"
            for byte in self.text
        )


class _Facts:
    # SIZE, OFFSET and SYMBOL of VMCOREINFO, and integers in the kernel's byte order.

    def __init__(self, text: bytes, read: ReadKernel, byte_order: ByteOrder, word: int) -> None:
        self._text = text
        self.read = read
        self.byte_order = byte_order
        self.word = word

    def symbol(self, name: str) -> int | None:
        return vmcoreinfo_number(self._text, f"SYMBOL({name})", 16)

    def size(self, name: str) -> int:
        return self._number(f"SIZE({name})", 1)

    def offset(self, name: str) -> int:
        return self._number(f"OFFSET({name})", 0)

    def has(self, name: str) -> bool:
        return vmcoreinfo_number(self._text, f"SIZE({name})") is not None

    def _number(self, key: str, least: int) -> int:
        value = vmcoreinfo_number(self._text, key)
        if value is None or not least <= value <= _STRUCT_SIZE_MAX:
            raise SourceError(f"VMCOREINFO has no usable {key}: the kernel's log cannot be read")
        return value

    def integer(self, data: bytes | _Pieces, offset: int, size: int) -> int:
        if offset + size > len(data):
            raise SourceError("VMCOREINFO contradicts itself: the kernel's log cannot be read")
        return int.from_bytes(data[offset : offset + size], self.byte_order)

    def load(self, address: int, size: int) -> int:
        return int.from_bytes(self.read(address, size), self.byte_order)


class _Pieces:
    """Kernel memory that is read when it is looked at, in pieces of which the last is kept."""

    def __init__(self, read: ReadKernel, address: int, size: int) -> None:
        self._read = read
        self._address = address
        self._size = size
        self._piece = (0, b"")

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        content = b""
        while start < stop:
            first = start // _PIECE_SIZE * _PIECE_SIZE
            if self._piece[0] != first or not self._piece[1]:
                size = min(_PIECE_SIZE, self._size - first)
                self._piece = first, self._read(self._address + first, size)
            taken = self._piece[1][start - first : stop - first]
            content += taken
            start += len(taken)
        return content


def read_kernel_log(
    vmcoreinfo: bytes, read: ReadKernel, byte_order: ByteOrder, word_size: int
) -> Iterator[LogRecord]:
    """Yield the records of the log, oldest first.

    Args:
        vmcoreinfo: What the kernel says of itself.
        read: Reads kernel memory.
        byte_order: The byte order of the guest.
        word_size: The word size of the kernel's `long`, in bytes.

    Raises:
        SourceError: There is no log where VMCOREINFO says, or it is of an unknown kind.
    """
    facts = _Facts(vmcoreinfo, read, byte_order, word_size)
    if (pointer := facts.symbol("prb")) is not None:
        yield from _ring_buffer(facts, facts.load(pointer, word_size))
    elif (pointer := facts.symbol("log_buf")) is not None:
        yield from _record_buffer(facts, facts.load(pointer, word_size))
    else:
        raise SourceError("VMCOREINFO does not say where the kernel's log is")


class _Ring(Value):
    """Where struct printk_ringbuffer has its parts.

    Attributes:
        head: Number of the last record.
        tail: Number of the first one.
        count: Of descriptors and informations.
        descriptors: Address of the first one.
        infos: Likewise.
        texts: Likewise.
        text_size: Of all texts, in bytes.
    """

    head: int
    tail: int
    count: int
    descriptors: int
    infos: int
    texts: int
    text_size: int


def _find_ring(facts: _Facts, address: int) -> _Ring:
    word, integer = facts.word, facts.integer
    ring = facts.read(address, facts.size("printk_ringbuffer"))
    descriptors_at = facts.offset("printk_ringbuffer.desc_ring")
    texts_at = facts.offset("printk_ringbuffer.text_data_ring")
    counter = facts.offset("atomic_long_t.counter")

    def of_descriptors(member: str, size: int, inside: int = 0) -> int:
        return integer(
            ring, descriptors_at + facts.offset(f"prb_desc_ring.{member}") + inside, size
        )

    count_bits = of_descriptors("count_bits", 4)
    size_bits = integer(ring, texts_at + facts.offset("prb_data_ring.size_bits"), 4)
    if count_bits > _COUNT_BITS_MAX or (1 << min(size_bits, 64)) > _LOG_SIZE_MAX:
        raise SourceError(f"the kernel's log is impossible: 2^{count_bits} in 2^{size_bits} bytes")
    return _Ring(
        head=of_descriptors("head_id", word, counter),
        tail=of_descriptors("tail_id", word, counter),
        count=1 << count_bits,
        descriptors=of_descriptors("descs", word),
        infos=of_descriptors("infos", word),
        texts=integer(ring, texts_at + facts.offset("prb_data_ring.data"), word),
        text_size=1 << size_bits,
    )


def log_places(
    vmcoreinfo: bytes, read: ReadKernel, byte_order: ByteOrder, word_size: int
) -> list[tuple[int, int]]:
    """Return the kernel addresses and sizes of the parts of the log; arguments as below.

    Raises:
        SourceError: As below.
    """
    facts = _Facts(vmcoreinfo, read, byte_order, word_size)
    if (pointer := facts.symbol("prb")) is not None:
        address = facts.load(pointer, word_size)
        ring = _find_ring(facts, address)
        return [
            (pointer, word_size),
            (address, facts.size("printk_ringbuffer")),
            (ring.descriptors, ring.count * facts.size("prb_desc")),
            (ring.infos, ring.count * facts.size("printk_info")),
            (ring.texts, ring.text_size),
        ]
    if (pointer := facts.symbol("log_buf")) is not None:
        size_at = facts.symbol("log_buf_len")
        size = 0 if size_at is None else facts.load(size_at, 4)
        return [(pointer, word_size), (facts.load(pointer, word_size), min(size, _LOG_SIZE_MAX))]
    raise SourceError("VMCOREINFO does not say where the kernel's log is")


def _ring_buffer(facts: _Facts, address: int) -> Iterator[LogRecord]:
    """Walk struct printk_ringbuffer: descriptors, informations, and a ring of texts."""
    word, integer = facts.word, facts.integer
    ring = _find_ring(facts, address)
    count, text_size = ring.count, ring.text_size
    descriptor_size, info_size = facts.size("prb_desc"), facts.size("printk_info")
    descriptors = _Pieces(facts.read, ring.descriptors, count * descriptor_size)
    infos = _Pieces(facts.read, ring.infos, count * info_size)
    texts = _Pieces(facts.read, ring.texts, text_size)
    left = text_size
    counter = facts.offset("atomic_long_t.counter")
    id_mask = (1 << 8 * word - _STATE_BITS) - 1
    head, tail = ring.head, ring.tail
    state_at = facts.offset("prb_desc.state_var") + counter
    block_at = facts.offset("prb_desc.text_blk_lpos")
    begin_at = block_at + facts.offset("prb_data_blk_lpos.begin")
    next_at = block_at + facts.offset("prb_data_blk_lpos.next")
    stamp_at, length_at = (facts.offset(f"printk_info.{name}") for name in ("ts_nsec", "text_len"))
    for step in range(min((head - tail) & id_mask, count - 1) + 1):
        number = (tail + step) & id_mask
        descriptor = (number % count) * descriptor_size
        state = integer(descriptors, descriptor + state_at, word)
        if state & id_mask != number or state >> 8 * word - _STATE_BITS not in {
            _COMMITTED,
            _FINALIZED,
        }:
            continue
        begin = integer(descriptors, descriptor + begin_at, word) % text_size
        behind = integer(descriptors, descriptor + next_at, word) % text_size
        if begin == behind:  # a record without text
            continue
        start = (0 if begin > behind else begin) + word  # its id stands in front of the text
        info = (number % count) * info_size
        length = min(integer(infos, info + length_at, 2), max(behind - start, 0))
        left -= length
        if left < 0:  # no two records of a sound log have the same text
            raise SourceError("the kernel's log contradicts itself: it has more than its texts")
        yield LogRecord(integer(infos, info + stamp_at, 8), texts[start : start + length])


def _record_buffer(facts: _Facts, address: int) -> Iterator[LogRecord]:
    """Walk the buffer of struct printk_log: records behind each other, length 0 at the wrap."""
    name = "printk_log" if facts.has("printk_log") else "log"
    symbols = ("log_buf_len", "log_first_idx", "log_next_idx")
    addresses = [facts.symbol(symbol) for symbol in symbols]
    numbers = [facts.load(place, 4) for place in addresses if place is not None]
    if len(numbers) < len(addresses):
        raise SourceError("VMCOREINFO does not tell the bounds of the kernel's log")
    size, first, behind = numbers
    if size > _LOG_SIZE_MAX:
        raise SourceError(f"the kernel's log of {size:#x} bytes is impossible")
    buffer = facts.read(address, size)
    header = facts.size(name)
    stamp_at, length_at, text_at = (
        facts.offset(f"{name}.{member}") for member in ("ts_nsec", "len", "text_len")
    )
    position, wrapped = first, False
    while position != behind and position + header <= size:
        length = facts.integer(buffer, position + length_at, 2)
        if not length:
            if wrapped:
                return
            wrapped, position = True, 0
            continue
        text_size = min(facts.integer(buffer, position + text_at, 2), max(length - header, 0))
        text = buffer[position + header :][:text_size]
        yield LogRecord(facts.integer(buffer, position + stamp_at, 8), text)
        position += length
