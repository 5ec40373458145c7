"""The log of a kernel that has not written its VMCOREINFO yet, which it does late in its boot.

Nothing tells where the log is, or how its structures are laid out. So memory is searched for the
kernel's banner, and the banner is taken for a record of a log where what stands around it is one:
the text of a record begins behind the number of its descriptor (5.10 and newer), or behind a
header that tells its length (3.5 to 5.9). The other records follow from there.

Source: Linux kernel/printk/printk_ringbuffer.{c,h} (struct prb_data_block, DESC0_ID, struct
printk_info), kernel/printk/printk.c (struct printk_log up to 5.9).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from itertools import product

from qemu_dump_ext.errors import GuestMemoryFaultError
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock, block_at
from qemu_dump_ext.linux.kernel_log import LogRecord
from qemu_dump_ext.pages.pipeline import populated_ranges
from qemu_dump_ext.structures.c_struct import ByteOrder
from qemu_dump_ext.value import Value

_BANNER = b"Linux version "
_PIECE = 4 << 20
_BEFORE = 64 << 10
"""Bytes in front of the banner in which records may be; what is printed before it is short."""
_BEHIND = 4 << 20
_BANNERS_MAX = 64
_RECORDS_MAX = 1 << 16
_TEXT_MAX = (1 << 16) - 1
_DESCRIPTORS_MAX = 1 << 20
_STATE_BITS = 2
"""Of the word that has the state of a descriptor and its number."""
_NEAR = 64 << 20
"""Bytes around a log in which the static structures of the same kernel are."""
_INFO_SIZES = (88, *range(92, 136, 4))
"""Of struct printk_info, in which newer kernels may have more at the end."""
_STAMP_AT, _LENGTH_AT = 8, 16
"""In it, of ts_nsec and text_len."""
_REST_MAX = 16
_OLD_HEADERS = (16, 24, 20)
"""Bytes of struct printk_log, without and with the caller."""
_SECONDS = 60.0


class EarlyLog(Value):
    """What was found.

    Attributes:
        records: Oldest first.
        gpa: Where the first one is.
        has_stamps: Their times were found as well; otherwise they are 0.
    """

    records: Sequence[LogRecord]
    gpa: int
    has_stamps: bool


class _Form(Value):
    byte_order: ByteOrder
    word: int

    def integer(self, data: bytes, at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], self.byte_order)

    def number(self, value: int, size: int) -> bytes:
        return value.to_bytes(size, self.byte_order)


class EarlyLogSearch:
    """A search through the memory of one guest.

    Attributes:
        gave_up: Whether the time was over before all memory had been looked at, or before the
            times of what was found were.
    """

    def __init__(
        self,
        memory: GuestMemory,
        ram_blocks: Sequence[RamBlock],
        byte_order: ByteOrder,
        *,
        seconds: float = math.inf,
    ) -> None:
        """Prepare.

        Args:
            memory: Of the guest.
            ram_blocks: Where it has memory, by ascending gpa.
            byte_order: Of the vCPUs, which a kernel may change: the likely one.
            seconds: How long the search may take, if that is less than it may take by itself.
        """
        self._memory = memory
        self._blocks = ram_blocks
        orders: tuple[ByteOrder, ByteOrder] = (
            ("little", "big") if byte_order == "little" else ("big", "little")
        )
        self._forms = [_Form(order, word) for order, word in product(orders, (8, 4))]
        self._end = time.monotonic() + min(seconds, _SECONDS)
        self.gave_up = False

    def find(self) -> EarlyLog | None:
        """Return the log with the most records: a kernel moves its log to a larger place."""
        found: list[EarlyLog] = []
        for count, gpa in enumerate(self._banners(), 1):
            log = self._log_around(gpa)
            if log is not None:
                found.append(log)
            if count >= _BANNERS_MAX:
                break
        return max(found, key=lambda log: len(log.records), default=None)

    def _banners(self) -> Iterator[int]:
        for block in self._blocks:
            for start, end in populated_ranges(self._memory, block.gpa, block.end):
                for gpa in range(start, end, _PIECE):
                    if time.monotonic() > self._end:
                        self.gave_up = True
                        return
                    content = self._read(gpa, min(_PIECE + len(_BANNER) - 1, end - gpa))
                    for match in re.finditer(_BANNER, content):
                        yield gpa + match.start()

    def _read(self, gpa: int, size: int) -> bytes:
        data = bytearray(size)
        try:
            self._memory.read_into(gpa, memoryview(data))
        except GuestMemoryFaultError:
            return b""
        return bytes(data)

    def _log_around(self, banner: int) -> EarlyLog | None:
        block = block_at(self._blocks, banner)
        if block is None:
            return None
        start = max(block.gpa, banner - _BEFORE & -16)
        content = self._read(start, min(block.end, banner + _BEHIND) - start)
        at = banner - start
        for form in self._forms:
            texts = _ring_texts(form, content, at)
            if texts:
                return self._with_stamps(form, texts, start)
            records = _old_records(form, content, at)
            if records:
                return EarlyLog([record for _, record in records], start + records[0][0], True)
        return None

    def _with_stamps(self, form: _Form, texts: Sequence[tuple[int, bytes]], start: int) -> EarlyLog:
        gpa = start + texts[0][0]
        room = [text for _, text in texts]
        infos = self._infos(form, [len(text) for text in room], gpa)
        if infos is None:
            records = [LogRecord(0, _without_rest(text)) for text in room]
        else:
            records = [
                LogRecord(stamp, text[:length])
                for text, (stamp, length) in zip(room, infos, strict=True)
            ]
        return EarlyLog(records, gpa, infos is not None)

    def _infos(self, form: _Form, sizes: Sequence[int], gpa: int) -> list[tuple[int, int]] | None:
        """Return time and length of each record, from the struct printk_info of each.

        Args:
            form: Of the kernel.
            sizes: How many bytes each text may have.
            gpa: Of the first text.
        """
        chosen = max(range(min(len(sizes), 16)), key=lambda index: _has_no_zero(sizes[index]))
        lengths = _length_field(form, chosen, sizes[chosen])
        low, high = max(0, gpa - _NEAR), gpa + _NEAR
        pieces = [
            (start, min(_PIECE + (1 << 10), block.end - start))
            for block in self._blocks
            for start in range(max(low, block.gpa), min(high, block.end), _PIECE)
        ]
        # It is an array of the kernel's as the text is: near it, mostly.
        for start, size in sorted(pieces, key=lambda piece: abs(piece[0] - gpa)):
            if time.monotonic() > self._end:
                self.gave_up = True
                return None
            content = self._read(start, size)
            for match in lengths.finditer(content):
                info = match.start() - _low_byte_at(form)
                # The bytes of a length match one by one, as those of none may, too.
                if not _fits(form.integer(content, info + _LENGTH_AT, 2), sizes[chosen]):
                    continue
                if time.monotonic() > self._end:
                    self.gave_up = True
                    return None
                infos = self._infos_at(form, sizes, chosen, start + info)
                if infos is not None:
                    return infos
        return None

    def _infos_at(
        self, form: _Form, sizes: Sequence[int], chosen: int, info: int
    ) -> list[tuple[int, int]] | None:
        for size in _INFO_SIZES:
            begin = info - size * chosen
            block = block_at(self._blocks, begin) if begin >= 0 else None
            if block is None or begin + size * len(sizes) > block.end:
                continue
            content = self._read(begin, size * len(sizes))
            # The last one may still be written while the kernel stands.
            if content and all(
                form.integer(content, size * index, 8) == index
                and _fits(form.integer(content, size * index + _LENGTH_AT, 2), sizes[index])
                for index in range(max(1, len(sizes) - 1))
            ):
                return [
                    (
                        form.integer(content, size * index + _STAMP_AT, 8),
                        form.integer(content, size * index + _LENGTH_AT, 2),
                    )
                    for index in range(len(sizes))
                ]
        return None


def _fits(length: int, size: int) -> bool:
    return length in _lengths(size)


def _lengths(size: int) -> range:
    # Behind a text there may be its newline, what its level was, and the end of a longer draft.
    return range(max(0, size - _REST_MAX), size + 1)


def _has_no_zero(size: int) -> tuple[bool, int]:
    """Return how well a record is told from empty memory by its length; the longer the better."""
    return all(length & 0xFF for length in _lengths(size)), size


def _low_byte_at(form: _Form) -> int:
    return _LENGTH_AT if form.byte_order == "little" else _LENGTH_AT + 1


def _length_field(form: _Form, number: int, size: int) -> re.Pattern[bytes]:
    """Return what the low byte of a record's length matches, with all that is known around it.

    The first records have the number 0 and the time 0, as empty memory has it everywhere: what is
    looked for first has to be something else.

    Args:
        form: Of the kernel.
        number: Of the record.
        size: How many bytes its text may have.
    """
    low = _one_of({length & 0xFF for length in _lengths(size)})
    high = _one_of({length >> 8 for length in _lengths(size)})
    before = re.escape(form.number(number, 8)) + b"." * (_LENGTH_AT - _STAMP_AT)
    around = (
        b"%b(?<=%b%b)(?=%b)" % (low, before, low, high)
        if form.byte_order == "little"
        else b"%b(?<=%b%b%b)" % (low, before, high, low)
    )
    return re.compile(around, re.DOTALL)


def _one_of(values: set[int]) -> bytes:
    return b"[%b]" % b"".join(b"\\x%02x" % value for value in sorted(values))


def _without_rest(text: bytes) -> bytes:
    newline = text.rfind(b"\n", max(0, len(text) - _REST_MAX))
    return text if newline < 0 else text[:newline]


def _ring_texts(form: _Form, content: bytes, banner: int) -> list[tuple[int, bytes]]:
    """Return (offset, text) of the records of a ring of texts around the banner, or nothing."""
    word = form.word
    numbers = 1 << 8 * word - _STATE_BITS
    place = banner - word
    number = form.integer(content, place, word) if place >= 0 and place % word == 0 else 0
    # Numbers begin below 0: in unsigned int, in a kernel of 64 bits as well.
    limits = (1 << 32, numbers) if word == 8 else (numbers,)
    limit = next((end for end in limits if end - _DESCRIPTORS_MAX <= number < end), None)
    if limit is None:
        return []
    places = [place]
    while number - 1 >= limit - _DESCRIPTORS_MAX:
        earlier = _aligned(form, content, number - 1, max(0, place - _TEXT_MAX), place)
        if not earlier:
            break
        place, number = earlier[-1], number - 1
        places.insert(0, place)
    if (limit - number).bit_count() != 1:  # the first is as far below 0 as there are descriptors
        return []
    number, place = form.integer(content, places[-1], word) + 1, places[-1]
    while len(places) < _RECORDS_MAX:
        following = _aligned(form, content, number % numbers, place + word, place + _TEXT_MAX)
        if not following:
            break
        place, number = following[0], number + 1
        places.append(place)
    ends = [*places[1:], content.find(b"\0", places[-1] + word)]
    return [
        (start, content[start + word : end].rstrip(b"\0"))
        for start, end in zip(places, ends, strict=True)
    ]


def _aligned(form: _Form, content: bytes, number: int, start: int, end: int) -> list[int]:
    wanted = form.number(number, form.word)
    found = []
    at = content.find(wanted, start, end)
    while at >= 0:
        if at % form.word == 0:
            found.append(at)
        at = content.find(wanted, at + 1, end)
    return found


def _old_records(form: _Form, content: bytes, banner: int) -> list[tuple[int, LogRecord]]:
    """Return (offset, record) of the log of records of 3.5 to 5.9 that has the banner, or none."""
    for header in _OLD_HEADERS:
        first = banner - header
        found: list[tuple[int, LogRecord]] = []
        while (size := _old_size(form, content, first, header)) and len(found) < _RECORDS_MAX:
            text = content[first + header :][: form.integer(content, first + 10, 2)]
            found.append((first, LogRecord(form.integer(content, first, 8), text)))
            first += size
        if len(found) > 1:
            return _old_records_before(form, content, banner - header, header) + found
    return []


def _old_records_before(
    form: _Form, content: bytes, first: int, header: int
) -> list[tuple[int, LogRecord]]:
    found: list[tuple[int, LogRecord]] = []
    while True:
        places = range(first - header - 4, max(0, first - 1024), -4)
        before = next(
            (at for at in places if _old_size(form, content, at, header) == first - at), None
        )
        if before is None:
            return found
        text = content[before + header :][: form.integer(content, before + 10, 2)]
        found.insert(0, (before, LogRecord(form.integer(content, before, 8), text)))
        first = before


def _old_size(form: _Form, content: bytes, at: int, header: int) -> int:
    """Return the size of the record at an offset, or 0 where there is none."""
    if at < 0 or at + header > len(content):
        return 0
    size, text_size, dictionary = (form.integer(content, at + place, 2) for place in (8, 10, 12))
    used = header + text_size + dictionary
    text = content[at + header : at + header + text_size]
    plausible = text_size > 0 and used <= size < used + 8 and size % 4 == 0 and b"\0" not in text
    return size if plausible else 0
