"""Find the pages of a buffer that hold something else than zeros.

By numpy where it was imported (gdb's own Python may lack it, and for a small guest its import takes
longer than it saves), page by page otherwise.
"""

from __future__ import annotations

import importlib
import mmap
import os
from functools import cache
from itertools import groupby
from types import ModuleType

_WORD = 8
_ALGEBRA_THREADS = "OPENBLAS_NUM_THREADS"
_IMPORT_SIZE = 256 << 20
"""Bytes of address space; the import takes half of it."""
_WORTH_IMPORTING = 64 << 20
"""Bytes of guest memory up to which the import takes longer than it saves."""


@cache
def numpy_or_none() -> ModuleType | None:
    """Return numpy where it can be imported."""
    # Its library for algebra, which is not used here, starts a thread for each CPU; where the host
    # does not allow them, it interrupts this process, and without memory it ends it.
    try:
        mmap.mmap(-1, _IMPORT_SIZE).close()
    except OSError:
        return None
    before = os.environ.get(_ALGEBRA_THREADS)
    os.environ[_ALGEBRA_THREADS] = "1"
    try:
        return importlib.import_module("numpy")
    except ImportError:
        return None
    finally:
        if before is None:
            del os.environ[_ALGEBRA_THREADS]
        else:
            os.environ[_ALGEBRA_THREADS] = before


def numpy_if_loaded() -> ModuleType | None:
    """Return numpy where it was asked for before; it is not imported."""
    return numpy_or_none() if numpy_or_none.cache_info().currsize else None


def load_before_stopping(memory_size: int | None = None) -> None:
    """Load what ends this process where memory is short: while no guest is stopped by it.

    Args:
        memory_size: Of the guest, in bytes; None: not known.
    """
    if memory_size is None or memory_size > _WORTH_IMPORTING:
        numpy_or_none()


def pages_with_content(view: memoryview, page_size: int) -> list[int]:
    """Return the numbers of the pages of `view` that are not all zeros.

    Args:
        view: A whole number of pages.
        page_size: In bytes, a multiple of 8.
    """
    numpy = numpy_if_loaded()
    if numpy is not None:
        words = numpy.frombuffer(view, dtype=numpy.uint64).reshape(-1, page_size // _WORD)
        indices: list[int] = numpy.bitwise_or.reduce(words, axis=1).nonzero()[0].tolist()
        return indices
    zeros = bytes(page_size)
    content = view.tobytes()
    starts = range(0, len(content), page_size)
    return [n for n, start in enumerate(starts) if content[start : start + page_size] != zeros]


def runs_with_content(view: memoryview, page_size: int, gap: int) -> list[tuple[int, int]]:
    """Return the ranges of `view` outside of which everything is zero.

    Args:
        view: Any number of bytes.
        page_size: What is looked at as one, in bytes.
        gap: Zeros of fewer pages than this stay in a range.

    Returns:
        First byte and first byte behind of each range, in order, not overlapping.
    """
    whole = len(view) // page_size * page_size
    pages = pages_with_content(view[:whole], page_size)
    if any(view[whole:].tobytes()):
        pages.append(whole // page_size)
    runs: list[tuple[int, int]] = []
    # Numbers minus positions are equal within a run of consecutive pages.
    for _, group in groupby(enumerate(pages), lambda item: item[1] - item[0]):
        numbers = [number for _, number in group]
        start, end = numbers[0] * page_size, (numbers[-1] + 1) * page_size
        if runs and start - runs[-1][1] < gap * page_size:
            start = runs.pop()[0]
        runs.append((start, min(end, len(view))))
    return runs
