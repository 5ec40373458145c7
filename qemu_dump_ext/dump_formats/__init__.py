"""One file for each family of formats of a dump."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache

from qemu_dump_ext.discovery import load, names
from qemu_dump_ext.dump_formats._declaration import (
    DumpFormat,
    FormatFamily,
    ProgressCallback,
    WriteDump,
)
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.plan.request import DEFAULT_FORMAT

__all__ = [
    "DumpFormat",
    "FormatFamily",
    "ProgressCallback",
    "WriteDump",
    "all_dump_formats",
    "find_dump_format",
    "format_by_words",
    "format_words",
]


@cache
def all_dump_formats() -> dict[str, DumpFormat]:
    """Return every format by name, also those that need a package that is missing."""
    return {found.name: found for found in _formats()}


def _formats() -> Iterator[DumpFormat]:
    """Yield every format; a family is imported when the first of its formats is asked for."""
    for family in names(sys.modules[__name__]):
        yield from _formats_of(family)


@cache
def _formats_of(family: str) -> Sequence[DumpFormat]:
    return load(sys.modules[__name__], family, "FORMATS", FormatFamily).formats()


@cache
def find_dump_format(name: str) -> DumpFormat:
    """Return the format of this name; no other family is imported.

    Raises:
        RequestError: There is none; says which there are.
    """
    for family in names(sys.modules[__name__]):
        if name.replace("-", "_").startswith(family):
            for found in _formats_of(family):
                if found.name == name:
                    return found
    known = ", ".join(all_dump_formats())
    raise RequestError(f"unknown format {name!r}", hint=f"known: {known}")


def format_words() -> list[str]:
    """Return every word that may follow -z."""
    from qemu_dump_ext.page_codecs import UNCOMPRESSED, all_page_codecs  # noqa: PLC0415 - for kdumps

    return [*all_page_codecs(), UNCOMPRESSED.name]


def format_by_words(codec: str | None, *, raw: bool) -> str:
    """Return the name of the format that QEMU's options ask for.

    Args:
        codec: One of `format_words`; None: no -z.
        raw: -R, which means nothing without the word.
    """
    if not codec:
        return DEFAULT_FORMAT
    return next(found.name for found in _formats() if (found.codec, found.raw) == (codec, raw))
