"""Describe what is in a dump that exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from qemu_dump_ext.dump_readers import LISTED_MAX, DumpFile, reader_of
from qemu_dump_ext.errors import CorruptDumpError
from qemu_dump_ext.structures.elf import CORE_NOTE_TYPES, NOTE_TYPE_NAMES, NT_QEMU
from qemu_dump_ext.structures.elf_notes import Note

_QEMU_NOTE_HEAD = 8
"""Bytes of version and size, both u32, at the start of QEMU's note."""


def describe(file: str, dump: DumpFile) -> dict[str, Any]:
    """Return what `--json` prints, see above."""
    problems = [problem for part in dump.files for problem in part.image.problems]
    facts: dict[str, Any] = {
        "file": file,
        "format": dump.format,
        "size_bytes": dump.image.size,
        "byte_order": dump.byte_order,
        "word_bits": 8 * dump.word_size,
        "header": dict(dump.header),
    }
    parts: dict[str, Callable[[], Any]] = {
        **reader_of(dump).describe(dump.files[0]),
        "notes": lambda: [_describe_note(dump, note) for note in dump.notes],
        "vmcoreinfo": lambda: _describe_vmcoreinfo(dump),
        "memory": lambda: _describe_memory(dump.memory_ranges()),
    }
    for key, describe in parts.items():
        try:
            facts[key] = describe()
        except CorruptDumpError as error:
            facts[key] = None
            problems.append(f"{key}: {error}")
    if facts["memory"] is not None and (lost := _lost_bytes(dump)):
        problems.append(f"{lost} bytes of memory are not in the file: cut off or lost")
    return {**facts, "problems": problems}


def _lost_bytes(dump: DumpFile) -> int:
    """Return how much the dump says to have data of, and has not."""
    try:
        said, there = (
            sum(size for _, size in ranges)
            for ranges in (dump.stored_ranges(), dump.readable_ranges())
        )
    except CorruptDumpError:  # is told with the part that it is in
        return 0
    return said - there


def _describe_note(dump: DumpFile, note: Note) -> dict[str, Any]:
    names = {"CORE"} if note.type in CORE_NOTE_TYPES else {"CORE", "LINUX"}
    facts: dict[str, Any] = {
        "name": note.name,
        "type": note.type,
        "type_name": NOTE_TYPE_NAMES.get(note.type) if note.name in names else None,
        "size_bytes": len(note.descriptor),
        "offset": note.offset,
    }
    if note.is_prstatus:
        facts["pid"] = dump.pid_of(note)
    if note.name == "QEMU" and note.type == NT_QEMU and len(note.descriptor) >= _QEMU_NOTE_HEAD:
        facts["version"], facts["declared_bytes"] = (
            int.from_bytes(note.descriptor[start : start + 4], dump.byte_order) for start in (0, 4)
        )
    return facts


def _describe_vmcoreinfo(dump: DumpFile) -> dict[str, Any] | None:
    if dump.vmcoreinfo is None:
        return None
    return {"size_bytes": len(dump.vmcoreinfo), "facts": dict(dump.vmcoreinfo_facts)}


def _describe_memory(ranges: Iterable[tuple[int, int]]) -> dict[str, Any]:
    ranges = iter(ranges)
    listed = [{"gpa": gpa, "size_bytes": size} for gpa, size in islice(ranges, LISTED_MAX)]
    size, count = sum(item["size_bytes"] for item in listed), len(listed)
    for _, more in ranges:
        size, count = size + more, count + 1
    return {"size_bytes": size, "range_count": count, "ranges": listed}
