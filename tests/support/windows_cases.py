"""What may be wrong with the structures of a Windows guest, each as a change of a sound image."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.support.windows_guest import (
    BLOCKS_AT,
    BUGCHECK_AT,
    CONTEXT_AT,
    DATA_SIZE,
    KDBG_AT,
    MEMORY_MIB,
    PAGE,
    PRCB_AT,
    PRCB_CONTEXT,
    WindowsImage,
    note_of,
)

Change = Callable[[WindowsImage], "bytes | None"]
"""Changes an image; returns another note than that of its header, or None."""

_NOWHERE = 0x7000_0000
"""No image maps it."""
_END = MEMORY_MIB << 8  # pages


def _sound(_: WindowsImage) -> None:
    pass


def _crashed(image: WindowsImage) -> None:
    image.crash(0xE2, 1, 2, 3, 4)


def _decoded_copy(image: WindowsImage) -> None:
    image.set("BugcheckParameter1", image.base + KDBG_AT)
    image.set("KdDebuggerDataBlock", image.base + 0x3000)


def _set(name: str, value: int) -> Change:
    def change(image: WindowsImage) -> None:
        image.set(name, value)

    return change


def _pointer(offset: int, value: int) -> Change:
    def change(image: WindowsImage) -> None:
        image.store_pointer(offset, value)

    return change


def _both(first: Change, second: Change) -> Change:
    def change(image: WindowsImage) -> bytes | None:
        first(image)
        return second(image)

    return change


def _stored(offset: int, data: bytes) -> Change:
    def change(image: WindowsImage) -> None:
        image.store(offset, data)

    return change


def _with_bits_besides_the_base(image: WindowsImage) -> None:
    image.set("DirectoryTableBase", image.root | 0x1A)


def _unmapped(offset: int) -> Change:
    def change(image: WindowsImage) -> None:
        image.unmap(image.base + offset)

    return change


def _mapped_to(offset: int, gpa: int) -> Change:
    def change(image: WindowsImage) -> None:
        image.map(image.base + offset & -PAGE, gpa, PAGE)

    return change


def _runs(*runs: tuple[int, int]) -> Change:
    def change(image: WindowsImage) -> None:
        image.set_runs(runs)

    return change


def _bytes(offset: int, data: bytes) -> Change:
    def change(image: WindowsImage) -> None:
        image.header[offset : offset + len(data)] = data

    return change


def _note(make: Callable[[bytes], bytes]) -> Change:
    return lambda image: make(bytes(image.header))


def _more_runs_than_room(image: WindowsImage) -> None:
    # QEMU reads on in what follows the array: nothing but zeros here.
    image.set_runs([(1 + 2 * index, 1) for index in range(43 if image.word_size == 8 else 86)])
    start = 0x348 if image.word_size == 8 else 0x31C
    image.header[start : start + 256] = bytes(256)
    image.set("NumberOfRuns", 50 if image.word_size == 8 else 90)


def _contexts_over(target: int) -> Change:
    # Of the first processor, over what is read for the second one.
    def change(image: WindowsImage) -> None:
        image.store_pointer(PRCB_AT + PRCB_CONTEXT, image.base + target)

    return change


def _context_over_tables(image: WindowsImage) -> None:
    table, index, size = image.last_table(image.base + PRCB_AT + PAGE)
    image.map(image.base + DATA_SIZE, table, PAGE)
    at = image.base + DATA_SIZE + max(0, index * size - 0x90)
    image.store_pointer(PRCB_AT + PRCB_CONTEXT, at)


def _pfn_database_half_mapped(image: WindowsImage) -> None:
    # KDBG 0xC0 bytes and a half pointer before the end of a page, another copy of it elsewhere.
    kdbg = 2 * PAGE - 0xC0 - image.word_size // 2
    image.store(kdbg + 0x10, b"KDBG")
    image.set("KdDebuggerDataBlock", image.base + kdbg)
    image.unmap(image.base + 2 * PAGE)


CASES: Mapping[str, Change] = {
    "alive": _sound,
    "crashed": _crashed,
    "KDBG of the driver": _decoded_copy,
    "KDBG nowhere": _set("KdDebuggerDataBlock", _NOWHERE),
    "KDBG of the driver nowhere": _both(_decoded_copy, _set("BugcheckParameter1", _NOWHERE)),
    "no tag": _stored(KDBG_AT + 0x10, b"KD\0G"),
    "another signature": _bytes(0, b"PAGX"),
    "a signature with NUL": _bytes(0, b"P\0\x1b["),
    "another width": _bytes(4, b"DU32"),
    "no note": lambda _: b"",
    "short note": _note(lambda header: note_of(header[:-4])),
    "long note": _note(lambda header: note_of(header + bytes(4))),
    "a note of Linux": lambda _: note_of(b"OSRELEASE=6.1\nPAGESIZE=4096\n"),
    "a short name": _note(lambda header: note_of(bytes(8) + header, b"WIN\0")),
    "a padded name": _note(lambda header: note_of(header[:-2], b"VMCOREINF\0")),
    "no tables": _set("DirectoryTableBase", 0x1000000),
    "bits besides the base": _with_bits_besides_the_base,
    "KDBG ends early": _unmapped(KDBG_AT + 0x200),
    "PfnDatabase half mapped": _pfn_database_half_mapped,
    "KDBG without memory": _mapped_to(KDBG_AT + 0x200, 0x7000000),
    "no bugcheck data": _pointer(KDBG_AT + 0x88, _NOWHERE),
    "bugcheck data half mapped": _both(_crashed, _unmapped(BUGCHECK_AT + PAGE)),
    "bugcheck data half without memory": _both(_crashed, _mapped_to(BUGCHECK_AT + PAGE, 0x7000000)),
    "no processor block": _pointer(KDBG_AT + 0x218, _NOWHERE),
    "no second processor block": _pointer(KDBG_AT + 0x218, 0xFFC),
    "PRCB nowhere": _pointer(BLOCKS_AT, _NOWHERE),
    "context pointer unmapped": _unmapped(PRCB_AT + PAGE),
    "context nowhere": _pointer(PRCB_AT + PRCB_CONTEXT, _NOWHERE),
    "context half mapped": _unmapped(CONTEXT_AT + PAGE),
    "fewer processors": _set("NumberProcessors", 1),
    "no processors": _set("NumberProcessors", 0),
    "one context for all": _contexts_over(CONTEXT_AT + 2 * PAGE + 0x40),
    "a context over a PRCB": _contexts_over(PRCB_AT + PAGE + PRCB_CONTEXT - 0x98),
    "a context over page tables": _context_over_tables,
    "no runs": _runs(),
    "empty runs": _runs((0x1, 0), (0x10, 3), (0x20, 0)),
    "runs that touch": _runs((0x1, 0x9F), (0xA0, 0x60), (0x100, 0x100)),
    "runs beside memory": _runs((0x80, 0x20), (0xF00, 0x100)),
    "runs that descend": _runs((0x300, 0x10), (0x100, 0x10)),
    "runs that overlap": _runs((0x300, 0x10), (0x308, 0x10), (0x300, 0x10)),
    "all of memory": _runs((0, 0xA0), (0xC0, _END - 0xC0)),
    "more runs than room": _more_runs_than_room,
    "too many pages": _set("NumberOfPages", 0xFFFFFFF0),
    "DumpType of nobody": _set("DumpType", 0x77),
}
