"""`qemu-dump inspect`: what is in a dump.

With `--json` one object is printed. Numbers are numbers, sizes are bytes:

- `file`, `format` (name of what reads it: elf, kdump, migration, ...; with `-flattened` where it
  is inside makedumpfile's stream), `size_bytes` (of the dump itself, rearranged if flattened),
  `byte_order`, `word_bits`;
- `header`: the main header's members by their names in C; kdump also has `sub_header`;
- `notes`: of each `name`, `type`, `type_name` (NT_..., or null), `size_bytes`, `offset`, and where
  it applies `pid` (NT_PRSTATUS), `version` and `declared_bytes` (QEMU);
- `vmcoreinfo`: null, or `size_bytes` and `facts`, every line `KEY=VALUE` of it;
- `segments` (ELF): of each PT_LOAD the members `number`, `p_offset`, `p_vaddr`, ...; the first
  1024 of `segment_count`;
- `memory`: `size_bytes`, `range_count` and the first 1024 `ranges` (`gpa`, `size_bytes`);
- `pages` (kdump): `page_bytes`, bits of the `first_bitmap` and `second_bitmap`, pages that are
  `zero`, `raw`, `packed` (by codec), `lost`, `bad`; `stored_bytes`, and `ratio` (memory to stored
  bytes, null if nothing is stored);
- other parts that the format's reader describes;
- `problems`: what could not be shown, because the dump is damaged there, and how much memory is
  not in the file, because it is cut or was lost.

The exit status is 5 if there are problems; `qemu-dump verify` looks at every page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli._source_arguments import ANY_DUMP, add_source_arguments, open_source
from qemu_dump_ext.dump_readers import LISTED_MAX
from qemu_dump_ext.engine.inspect import describe
from qemu_dump_ext.errors import EXIT_SUCCESS, CorruptDumpError
from qemu_dump_ext.printable import printable

_LISTED_WORDS = 32

_FACTS_SHOWN = (
    "OSRELEASE",
    "BUILD-ID",
    "PAGESIZE",
    "KERNELOFFSET",
    "NUMBER(phys_base)",
    "NUMBER(PHYS_OFFSET)",
    "NUMBER(kimage_voffset)",
    "NUMBER(VA_BITS)",
    "NUMBER(pgtable_l5_enabled)",
    "SYMBOL(_stext)",
    "SYMBOL(swapper_pg_dir)",
    "SYMBOL(init_uts_ns)",
    "CRASHTIME",
)
_SHOWN_IN_THEIR_WAY = frozenset(
    (
        *("file", "format", "size_bytes", "byte_order", "word_bits", "header", "sub_header"),
        *("notes", "vmcoreinfo", "segment_count", "segments", "memory", "pages", "problems"),
    )
)
_IN_HEX = frozenset(
    (
        *("e_phoff", "e_shoff", "e_entry", "e_flags", "status", "max_mapnr", "max_mapnr_64"),
        *("phys_base", "offset_vmcoreinfo", "offset_note", "offset_eraseinfo"),
        *("gpa", "offset", "first"),
    )
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help=ANY_DUMP)
    add_source_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    with open_source(arguments.file, arguments) as dump:
        facts = describe(arguments.file, dump)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        for line in _in_words(facts):
            print(printable(line, keep="\t"))
    return CorruptDumpError.exit_status if facts["problems"] else EXIT_SUCCESS


def _size(size: int) -> str:
    return f"{size} bytes ({size / (1 << 20):.1f} MiB)" if size >= 1 << 16 else f"{size} bytes"


def _in_words(facts: dict[str, Any]) -> Iterator[str]:
    yield f"{facts['file']}: {facts['format']}, {_size(facts['size_bytes'])}"
    yield f"{facts['word_bits']} bit, {facts['byte_order']} endian"
    for key in ("header", "sub_header"):
        if key in facts:
            yield ""
            yield f"{key.replace('_', '-')}:"
            yield from _aligned(facts[key])
    if facts["notes"] is not None:
        yield ""
        yield f"notes: {len(facts['notes'])}"
        yield from map(_note_in_words, facts["notes"][:_LISTED_WORDS])
        yield from _rest(len(facts["notes"]))
    if facts["vmcoreinfo"] is not None:
        yield ""
        yield f"VMCOREINFO: {facts['vmcoreinfo']['size_bytes']} bytes"
        found = facts["vmcoreinfo"]["facts"]
        yield from _aligned({key: found[key] for key in _FACTS_SHOWN if key in found})
    if "segments" in facts:
        yield ""
        yield f"segments: {facts['segment_count']}"
        yield from map(_segment_in_words, facts["segments"][:_LISTED_WORDS])
        yield from _rest(facts["segment_count"])
    if facts["memory"] is not None:
        memory = facts["memory"]
        yield ""
        yield f"memory: {_size(memory['size_bytes'])}, ranges: {memory['range_count']}"
        for item in memory["ranges"][:_LISTED_WORDS]:
            start, size = item["gpa"], item["size_bytes"]
            yield f"  {start:#018x} to {start + size - 1:#018x}  {_size(size)}"
        yield from _rest(memory["range_count"])
    if facts.get("pages"):
        yield ""
        yield "pages:"
        yield from _aligned(_pages_in_words(facts["pages"]))
    for key in sorted(facts.keys() - _SHOWN_IN_THEIR_WAY):
        yield from _part_in_words(key, facts[key])
    if facts["problems"]:
        yield ""
    for problem in facts["problems"]:
        yield f"problem: {problem}"


def _part_in_words(key: str, part: object) -> Iterator[str]:
    # Of a format that is described here by nothing else.
    name = key.replace("_", " ")
    yield ""
    if isinstance(part, dict | list) and part:
        yield f"{name}:"
        if isinstance(part, dict):
            yield from _aligned(part)
        else:
            yield from (f"  {_item_in_words(item)}" for item in part[:_LISTED_WORDS])
            yield from _rest(len(part))
    else:
        yield f"{name}: {'none' if part in (None, '', [], {}) else part}"


def _item_in_words(item: object) -> str:
    if not isinstance(item, dict):
        return str(item)
    return "  ".join(f"{key} {_value_in_words(key, value)}" for key, value in item.items())


def _value_in_words(key: str, value: object) -> str:
    return hex(value) if key in _IN_HEX and isinstance(value, int) else str(value)


def _rest(count: int) -> Iterator[str]:
    if count > _LISTED_WORDS:
        yield f"  and {count - _LISTED_WORDS} more (--json lists up to {LISTED_MAX})"


def _aligned(facts: dict[str, Any]) -> Iterator[str]:
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        if value != "":
            yield f"  {key:{width}}  {_value_in_words(key, value)}"


def _note_in_words(note: dict[str, Any]) -> str:
    extra = "".join(
        f"  {key} {note[key]}"
        for key in ("pid", "version", "declared_bytes")
        if note.get(key) is not None
    )
    type_name = note["type_name"] or f"type {note['type']:#x}"
    return f"  {note['name']:10}  {type_name:20}  {note['size_bytes']:6} bytes{extra}"


def _segment_in_words(segment: dict[str, Any]) -> str:
    sizes = _size(segment["p_memsz"])
    if segment["p_filesz"] != segment["p_memsz"]:
        sizes += f", {segment['p_filesz']} in the file"
    return (
        f"  {segment['p_paddr']:#018x}  at {segment['p_vaddr']:#018x}"
        f"  offset {segment['p_offset']:#x}  {sizes}"
    )


def _pages_in_words(pages: dict[str, Any]) -> dict[str, Any]:
    return {
        "page size": f"{pages['page_bytes']} bytes",
        "first bitmap": pages["first_bitmap"],
        "second bitmap": pages["second_bitmap"],
        "zero": f"{pages['zero']} (sharing one page)",
        "raw": pages["raw"],
        **pages["packed"],
        **{key: pages[key] for key in ("lost", "bad") if pages[key]},
        "stored": _size(pages["stored_bytes"]),
        "ratio": pages["ratio"] or "",
    }


COMMAND = Subcommand(
    name="inspect",
    help="show what is in a dump: headers, notes, memory, how pages are stored",
    add_arguments=_add_arguments,
    run=_run,
    examples=("vm.kdump", "--json vm.kdump"),
)
