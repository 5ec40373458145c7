"""Pack the pages of a buffer in place: one behind the other, compressed, without those of zeros.

All that packing processes need: nothing else is imported for them, for they are to come up soon.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from qemu_dump_ext.page_codecs import Compress, find_page_codec
from qemu_dump_ext.value import Value

PAGE_SIZES = "I"
"""Type code of the array of packed sizes."""
ORDER = struct.Struct("=QQQ")
"""Of a packing process: offset and size of what it is to pack, and the page size."""
READY = b"ready"
"""What a packing process says before its first order."""


class Compression(Value):
    """How the pages of a kdump are compressed.

    Attributes:
        codec: Name of it.
        exact: As QEMU does it.
        level: The level of the codec; None: the best trade of time and size.
    """

    codec: str
    exact: bool = False
    level: int | None = None

    def compressor(self) -> Compress:
        """Return a compressor for one thread.

        Raises:
            CodecUnavailableError: A package cannot be imported.
            RequestError: The codec has no such level.
        """
        codec = find_page_codec(self.codec)
        if self.exact or codec.tuned is None:
            return codec.compressor()
        return codec.tuned(self.level)


def pack_pages(
    view: memoryview, page_size: int, compress: Callable[[bytes], bytes | memoryview]
) -> array[int]:
    """Pack in place.

    Args:
        view: A whole number of pages; afterwards the packed ones, then what is left of others.
        page_size: The page size in bytes.
        compress: Packs one page; is asked for each that is no zeros, in their order.

    Returns:
        For each page its packed size in bytes: 0 for one of zeros, which is left out, and
        `page_size` for one that compression would not make smaller, which stays as it is.
    """
    zeros = bytes(page_size)
    sizes = array(PAGE_SIZES)
    end = 0
    for start in range(0, len(view), page_size):
        # A copy of a page stays in the processor's cache; one of all needs new memory each time.
        page = view[start : start + page_size].tobytes()
        if page == zeros:
            sizes.append(0)
            continue
        packed = compress(page)
        size = len(packed)
        if size >= page_size:
            packed, size = page, page_size
        view[end : end + size] = packed
        end += size
        sizes.append(size)
    return sizes


def serve(
    connections: Sequence[int], memory: int, codec: str, *, exact: bool, level: int | None
) -> NoReturn:
    """Pack what is ordered until the other side goes: what packing processes do.

    The one that is started divides into one for each connection when it has imported what it needs.
    It ends last, so that the time that the others take counts as its own.

    Args:
        connections: Descriptors of sockets that keep messages apart.
        memory: Descriptor of the buffers.
        codec: As all behind it, a field of `Compression`.
        exact: Likewise.
        level: Likewise.
    """
    compress = Compression(codec, exact=exact, level=level).compressor()
    whole = memoryview(mmap.mmap(memory, 0))
    connection = _divide(connections)
    with suppress(ConnectionError):
        os.write(connection, READY)
        while order := os.read(connection, ORDER.size):
            offset, size, page_size = ORDER.unpack(order)
            os.write(connection, pack_pages(whole[offset : offset + size], page_size, compress))
    os.close(connection)
    with suppress(ChildProcessError):
        while os.wait():
            pass
    os._exit(0)  # at once: nothing is to be put in order


def _divide(connections: Sequence[int]) -> int:
    """Make this process one for each connection; return that of the one that this is now."""
    while len(connections) > 1:
        first, *others = connections
        try:
            is_first = not os.fork()
        except OSError:  # the host allows no more: nobody answers there
            is_first = False
        connections, closed = ([first], others) if is_first else (others, [first])
        for connection in closed:
            os.close(connection)
    return connections[0]
