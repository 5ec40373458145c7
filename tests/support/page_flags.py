"""What a Linux guest's own kernel says of each of its pages, by /proc/kpageflags.

Source: Linux Documentation/admin-guide/mm/pagemap.rst, include/uapi/linux/kernel-page-flags.h.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections import Counter
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from qemu_dump_ext.guest_images.machine import BootedGuest

_IN_A_BLOCK = 4096 // 8
_SAVE = "dd if=/proc/kpageflags bs=4096 skip={skip} | gzip >/dev/flags\n"
_PRINT = """for turn in 1 2 3; do echo flags "begin"; base64 -w 16 /dev/flags; done
for turn in 1 2 3; do echo flags "end" {number}; done
"""
_ATTEMPTS = 8
_LINE = re.compile(r"^[A-Za-z0-9+/=]+$", re.MULTILINE)
_SECONDS = 200
_BIG_ENDIAN = frozenset(("s390x",))
_LRU, _SLAB, _BUDDY, _ANON, _SWAPCACHE, _SWAPBACKED = 5, 7, 10, 12, 13, 14
_TAIL, _HUGE, _HWPOISON, _NOPAGE, _OFFLINE = 16, 17, 19, 20, 23

Pages = npt.NDArray[np.bool_]


class PageFlags:
    """The flags of all pages of a guest that ran a moment ago.

    Attributes:
        count: Pages, from pfn 0 on.
    """

    def __init__(self, guest: BootedGuest, first: int = 0) -> None:
        """Ask the shell of a guest that runs.

        Args:
            guest: Which.
            first: Pages below are of no interest; a multiple of 512.
        """
        guest.send_console(_SAVE.format(skip=first // _IN_A_BLOCK))
        content = _printed(guest)
        order = ">" if guest.image.target in _BIG_ENDIAN else "<"
        told = np.frombuffer(content, f"{order}u8").astype(np.uint64)
        below = np.full(first, 1 << _NOPAGE, np.uint64)
        self._flags = np.concatenate([below, told])
        self.count = len(self._flags)

    def of(self, bit: int) -> Pages:
        """Return the pages that have a flag."""
        return (self._flags >> np.uint64(bit) & np.uint64(1)).astype(bool)

    def left_out(self, level: int) -> Pages:
        """Return the pages that a dump of this level leaves out, were they all zeros or not."""
        slab, anonymous = self.of(_SLAB), self.of(_ANON)
        cache = self.of(_LRU) | self.of(_SWAPCACHE) & self.of(_SWAPBACKED)
        out = self.of(_HWPOISON) | self.of(_OFFLINE)
        if level & 2:
            out |= cache & ~anonymous
        if level & 8:
            out |= (anonymous | self.of(_HUGE)) & ~slab
        return self._with_tails(out) | (self.of(_BUDDY) if level & 16 else False)

    def there(self) -> Pages:
        """Return the pages that have a struct page."""
        return ~self.of(_NOPAGE)

    def _with_tails(self, pages: Pages) -> Pages:
        # What is said of the first page of a compound one holds for all of it.
        numbers = np.arange(self.count)
        heads = np.maximum.accumulate(np.where(self.of(_TAIL), 0, numbers))
        spread: Pages = pages[heads]
        return spread


def _printed(guest: BootedGuest) -> bytes:
    # Where a console is slow, some characters come twice or not at all, but not in each print.
    for number in range(_ATTEMPTS):
        guest.send_console(_PRINT.format(number=number))
        end = re.compile(rf"^flags end {number}$", re.MULTILINE)
        text = guest.wait_for_console(end, timeout_seconds=_SECONDS)
        with suppress(ValueError, zlib.error):
            return zlib.decompress(base64.b64decode(_most_common(text)), wbits=31)
    raise AssertionError("the console cannot be read")


def _most_common(text: str) -> str:
    _, *prints = (_LINE.findall(one) for one in text.split("flags begin\n"))
    (count, _), *_ = Counter(map(len, prints)).most_common()
    lines = zip(*(one for one in prints if len(one) == count), strict=True)
    return "".join(Counter(variants).most_common(1)[0][0] for variants in lines)
