"""One file for each family of formats of a dump."""

from __future__ import annotations

import sys
from functools import cache

from qemu_dump_ext.discovery import collect
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
    families = collect(sys.modules[__name__], "FORMATS", FormatFamily)
    return {found.name: found for family in families.values() for found in family.formats()}


def find_dump_format(name: str) -> DumpFormat:
    """Return the format of this name.

    Raises:
        RequestError: There is none; says which there are.
    """
    found = all_dump_formats().get(name)
    if found is None:
        known = ", ".join(all_dump_formats())
        raise RequestError(f"unknown format {name!r}", hint=f"known: {known}")
    return found


def format_words() -> list[str]:
    """Return every word that may follow -z."""
    words = (found.codec for found in all_dump_formats().values())
    return list(dict.fromkeys(word for word in words if word))


def format_by_words(codec: str | None, *, raw: bool) -> str:
    """Return the name of the format that QEMU's options ask for.

    Args:
        codec: One of `format_words`; None: no -z.
        raw: -R, which means nothing without the word.
    """
    if not codec:
        return DEFAULT_FORMAT
    return next(
        found.name
        for found in all_dump_formats().values()
        if (found.codec, found.raw) == (codec, raw)
    )
