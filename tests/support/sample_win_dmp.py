"""What a Windows dump has besides the memory of the guest of a few pages."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.structures.win_dmp import (
    DUMP_TYPE_FULL,
    HEADERS,
    MACHINE_IMAGE_TYPES,
    PAGE_SHIFT,
    PAGE_SIZE,
    SIGNATURE,
    VALID_DUMP,
    PageRun,
    WindowsDump,
    encode_runs,
)


def sample_windows_dump(blocks: Sequence[RamBlock], word_size: int = 8) -> WindowsDump:
    """Return a header that lists all pages of RAM blocks, also those that are not whole."""
    runs = tuple(PageRun(block.gpa >> PAGE_SHIFT, -(-block.size // PAGE_SIZE)) for block in blocks)
    pages = sum(run.count for run in runs)
    layout = HEADERS[word_size]
    header = layout.pack(
        Signature=SIGNATURE,
        ValidDump=VALID_DUMP[word_size],
        MachineImageType=MACHINE_IMAGE_TYPES[word_size],
        NumberProcessors=1,
        NumberOfRuns=len(runs),
        NumberOfPages=pages,
        Run=encode_runs(runs, word_size),
        DumpType=DUMP_TYPE_FULL,
        RequiredDumpSpace=layout.size + pages * PAGE_SIZE,
    )
    return WindowsDump(word_size, header, runs)
