"""One file for each way to read guest physical memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from types import MappingProxyType

from qemu_dump_ext.discovery import collect
from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.guest.access import Monitor, SourceContext
from qemu_dump_ext.guest.memory import GuestMemory, PartialMemory
from qemu_dump_ext.guest.model import RamBlock
from qemu_dump_ext.memory_sources._composite import CompositeMemory
from qemu_dump_ext.memory_sources._declaration import MemorySource
from qemu_dump_ext.memory_sources._lasting import lasting
from qemu_dump_ext.pages.pipeline import populated_ranges
from qemu_dump_ext.qemu.monitor_text import parse_physical_bytes
from qemu_dump_ext.value import Value

__all__ = [
    "AUTO",
    "MemorySource",
    "OpenedMemory",
    "all_memory_sources",
    "memory_source_states",
    "monitor_read",
    "open_memory",
]

AUTO = "auto"
_SAMPLE_SIZE = 64
_SAMPLES = 4


@cache
def all_memory_sources() -> dict[str, MemorySource]:
    """Return every source by name, the fastest first."""
    sources = collect(sys.modules[__name__], "SOURCE", MemorySource)
    return dict(sorted(sources.items(), key=lambda item: item[1].rank))


class OpenedMemory(Value):
    """The memory that was chosen.

    Attributes:
        memory: To read from.
        passed_over: Other sources, and why each was not taken; grows when one fails in the middle.
        tried: Which sources were tried for all of memory, and why each cannot be used or None.
    """

    memory: GuestMemory
    passed_over: Sequence[tuple[str, str]]
    tried: Mapping[str, str | None]


@contextmanager
def open_memory(choice: str, context: SourceContext) -> Iterator[OpenedMemory]:
    """Open the source named `choice`, or with `auto` the fastest one that works.

    A source counts as working when it reads at several places what QEMU's monitor shows there.
    With `auto`, the next one goes on where one fails later on.

    Raises:
        RequestError: No such source.
        SourceError: It does not work here; with `auto`, none does, and every reason is told.
    """
    sources = all_memory_sources()
    if choice not in {AUTO, *sources}:
        raise RequestError(
            f"unknown memory source {choice!r}", hint="known: " + ", ".join((AUTO, *sources))
        )
    first = list(sources.values()) if choice == AUTO else [sources[choice]]
    passed_over: list[tuple[str, str]] = []
    with ExitStack() as stack:
        memory = _first_that_works(stack, first, context, passed_over)
        tried = {**dict(passed_over), memory.name: None}
        if isinstance(memory, PartialMemory) and memory.missing_blocks:
            # Whatever the choice was: it is about the blocks that it has.
            others = [source for source in sources.values() if source.name != memory.name]
            rest = replace(context, ram_blocks=memory.missing_blocks)
            filler = _lasting(stack, others, rest, passed_over)
            missing = set(memory.missing_blocks)
            memory = CompositeMemory(
                {b: filler if b in missing else memory for b in context.ram_blocks}
            )
        elif choice == AUTO:
            memory = _with_successors(memory, stack, first, context, passed_over)
        yield OpenedMemory(memory, passed_over, tried)


def _lasting(
    stack: ExitStack,
    candidates: Sequence[MemorySource],
    context: SourceContext,
    passed_over: list[tuple[str, str]],
) -> GuestMemory:
    memory = _first_that_works(stack, candidates, context, passed_over)
    return _with_successors(memory, stack, candidates, context, passed_over)


def _with_successors(
    memory: GuestMemory,
    stack: ExitStack,
    candidates: Sequence[MemorySource],
    context: SourceContext,
    passed_over: list[tuple[str, str]],
) -> GuestMemory:
    names = [source.name for source in candidates]

    def open_next(failed: str, error: SourceError) -> GuestMemory:
        passed_over.append((failed, str(error)))
        slower = candidates[names.index(failed) + 1 :]
        return _first_that_works(stack, slower, context, passed_over)

    return lasting(memory, open_next)


def _first_that_works(
    stack: ExitStack,
    candidates: Sequence[MemorySource],
    context: SourceContext,
    passed_over: list[tuple[str, str]],
) -> GuestMemory:
    for source in candidates:
        attempt = ExitStack()
        try:
            memory = attempt.enter_context(source.open(context))
            _prove(memory, context)
        except SourceError as error:
            attempt.close()
            passed_over.append((source.name, str(error)))
            continue
        except BaseException:
            attempt.close()
            raise
        stack.push(attempt)
        return memory
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    raise SourceError(f"guest memory cannot be read: {reasons}")


def memory_source_states(
    context: SourceContext, known: Mapping[str, str | None] = MappingProxyType({})
) -> Iterator[tuple[str, str | None]]:
    """Try every source that was not yet; yield its name, and why it cannot be used or None.

    Args:
        context: What sources may use.
        known: What is known of sources that were tried, as `OpenedMemory.tried` has it.
    """
    for source in all_memory_sources().values():
        if source.name in known:
            yield source.name, known[source.name]
            continue
        try:
            with source.open(context) as memory:
                _prove(memory, context)
        except SourceError as error:
            yield source.name, str(error)
        else:
            yield source.name, None


def _prove(memory: GuestMemory, context: SourceContext) -> None:
    # Registers of devices change by themselves, RAM of a stopped guest does not.
    missing = memory.missing_blocks if isinstance(memory, PartialMemory) else ()
    blocks = set(context.ram_blocks) - set(missing)
    largest = sorted(blocks, key=lambda block: (-block.size, block.gpa))[:_SAMPLES]
    places = [
        (gpa, size)
        for block in largest
        for size in (min(_SAMPLE_SIZE, block.size),)
        for gpa in _places(memory, block, size)
    ]
    shown = context.still.ask([_question(gpa, size) for gpa, size in places])
    for (gpa, size), text in zip(places, shown, strict=True):
        seen = bytearray(size)
        memory.read_into(gpa, memoryview(seen))
        if seen != parse_physical_bytes(text):
            raise SourceError(f"it reads other memory than the monitor at {gpa:#x}")


def _places(memory: GuestMemory, block: RamBlock, size: int) -> Iterator[int]:
    # To read what is not populated could make QEMU's process allocate it: a huge page, maybe.
    for start in (block.gpa, block.gpa + (block.size - size) // 2 & ~7):
        first, _ = next(populated_ranges(memory, start, block.end), (start, block.end))
        yield min(-(-first // 8) * 8, block.end - size)


def monitor_read(monitor: Monitor, gpa: int, size: int) -> bytes:
    """Read a little guest memory through the text of `xp`."""
    return parse_physical_bytes(monitor.execute(_question(gpa, size)))


def _question(gpa: int, size: int) -> str:
    return f"xp /{size}xb {gpa:#x}"
