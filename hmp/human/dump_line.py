"""The line `dump-guest-memory [-p] [-d] [-z|-l|-s|-w] [-R] filename [begin length]`.

Parsed as QEMU's monitor does. What QEMU would refuse is not refused here: such a line goes to QEMU
as it is, so that the message is that of the QEMU which is behind the proxy. Pure.

Source: QEMU monitor/hmp.c monitor_parse_arguments(), get_str(); hmp-commands.hx.
"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from qemu_dump_ext.options.dump_options import (
    DEFAULT_CODEC,
    NO_DUMP_LEVEL,
    DumpLevel,
    parse_dump_level,
    parse_size_above_zero,
)
from qemu_dump_ext.plan.request import MINI_DUMPS, Live, MiniDump
from qemu_dump_ext.value import Value

_FLAGS = "pdwzlsR"
_ESCAPES = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_CODECS = {"z": "zlib", "l": "lzo", "s": "snappy"}


class DumpLine(Value):
    """What a line asks of us.

    Attributes:
        filename: The filename as the user wrote it, without quotes.
        flags: Letters of the options.
        codec: The codec of a kdump; None for any other format.
        bounds: The text behind the filename: expressions for begin and length.
        memory: Name of the memory source; None: the proxy's default.
        mended: Not as QEMU writes it; None: the proxy's default.
        snapshot: Copy guest memory, let the guest run, write the copy.
        live: Have QEMU stream the guest while it runs.
        dump_level: Which pages are left out.
        mini: What more is left out, as `DumpRequest` has it.
        max_bytes: How large the dump may be, likewise.
        names_codec: It stands behind -z.
        windows: A Windows dump is asked for.
    """

    filename: str
    flags: frozenset[str]
    codec: str | None
    bounds: str
    memory: str | None = None
    mended: bool | None = None
    snapshot: bool = False
    live: Live | None = None
    dump_level: DumpLevel = NO_DUMP_LEVEL
    mini: MiniDump | None = None
    max_bytes: int | None = None
    names_codec: bool = False
    windows: bool = False

    @property
    def extends_qemu(self) -> bool:
        """Whether there are words in the line that QEMU does not know."""
        ours = self.memory is not None or self.mended is not None or self.snapshot
        less = self.dump_level.number > 0 or self.mini is not None or self.max_bytes is not None
        return ours or self.live is not None or self.names_codec or less


_SWITCHES: Mapping[str, Callable[[DumpLine], DumpLine]] = {
    "-mended": lambda line: replace(line, mended=True),
    "-exact": lambda line: replace(line, mended=False),
    "-snapshot": lambda line: replace(line, snapshot=True),
}


class NativeLine(Value):
    """QEMU is to handle the line.

    Attributes:
        line: What to send.
    """

    line: str


class BadExtension(Value):
    """One of our own options is wrong.

    Attributes:
        message: What to say.
    """

    message: str


class _QemuRefuses(Exception):  # noqa: N818 - leads to NativeLine, is no error
    pass


def parse_dump_line(
    line: str, codecs: Collection[str], sources: Collection[str]
) -> DumpLine | NativeLine | BadExtension:
    """Parse a line that begins with the command's name.

    Args:
        line: The line as entered.
        codecs: Words that may follow -z.
        sources: Words that may follow --memory.
    """
    match = re.match(r"\s*[^\s/]+", line)
    head = match[0] if match else ""
    try:
        return _parse(head, line[len(head) :], codecs, sources)
    except _QemuRefuses:
        return NativeLine(line)


def _parse(
    head: str, rest: str, codecs: Collection[str], sources: Collection[str]
) -> DumpLine | NativeLine | BadExtension:
    whole = rest
    parsed = DumpLine("", frozenset(), None, "")
    flags: set[str] = set()
    codec_word: str | None = None
    last = -1
    while (match := re.match(r"\s*-(-?\w+)?", rest)) is not None:
        word = match[1] or ""
        if word == "-native":
            return NativeLine(head + whole.replace(" --native", "", 1))
        taken = _take_extension(parsed, word, rest[match.end() :], sources)
        if isinstance(taken, BadExtension):
            return taken
        if taken is not None:
            parsed, rest = taken
            continue
        position = _FLAGS.find(word[:1]) if word[:1] else -1
        if position <= last:
            raise _QemuRefuses
        last = position
        flags.add(word[0])
        rest = rest[match.start(1) + 1 :]
        if word == "z":
            following = re.match(r"\s+(\S+)\s+\S", rest)
            if following and following[1] in codecs:
                codec_word = following[1]
                rest = rest[following.end(1) :]
    filename, bounds = _take_string(rest)
    chosen = [_CODECS[flag] for flag in "zls" if flag in flags]
    windows = "w" in flags
    if len(chosen) + windows > 1 or (windows and "R" in flags):
        raise _QemuRefuses
    codec = codec_word or (chosen[0] if chosen else None)
    if (windows or (codec and codec_word is None)) and (bounds.strip() or "p" in flags):
        raise _QemuRefuses
    return replace(
        parsed,
        filename=filename,
        flags=frozenset(flags),
        codec=codec or (DEFAULT_CODEC if parsed.mini else None),
        bounds=bounds.strip(),
        names_codec=codec_word is not None,
        windows=windows,
    )


def _take_extension(
    parsed: DumpLine, word: str, rest: str, sources: Collection[str]
) -> tuple[DumpLine, str] | BadExtension | None:
    """Return the line with an option of ours, and what is behind it; None where it is none."""
    if word == "-memory":
        value = re.match(r"\s*(\S+)", rest)
        if value is None or value[1] not in sources:
            return BadExtension(f"--memory: one of {', '.join(sources)} expected")
        return replace(parsed, memory=value[1]), rest[value.end() :]
    for (begin, behind), (parse, member) in _WITH_VALUE.items():
        if word == begin and (value := re.match(rf"{behind}(?:\s+|=)(\S+)", rest)):
            try:
                change = {member: parse(value[1])}
            except ArgumentTypeError as error:
                return BadExtension(f"-{begin}{behind}: {error}")
            return replace(parsed, **change), rest[value.end() :]
    if word in _WITH_WORD:
        return _WITH_WORD[word](parsed, rest)
    switch = _SWITCHES.get(word)
    return None if switch is None else (switch(parsed), rest)


def _take_live(parsed: DumpLine, rest: str) -> tuple[DumpLine, str] | BadExtension:
    value = re.match(r"=(\S*)", rest)
    if value is None:
        return replace(parsed, live=Live.REQUIRE), rest
    if value[1] not in tuple(Live):
        return BadExtension(f"--live: one of {', '.join(Live)} expected")
    return replace(parsed, live=Live(value[1])), rest[value.end() :]


def _take_mini(parsed: DumpLine, rest: str) -> tuple[DumpLine, str] | BadExtension:
    value = re.match(r"=(\S*)", rest)
    word = value[1] if value else MINI_DUMPS[0]
    for kind in MINI_DUMPS:
        if word == kind:
            # QEMU has none, so it cannot be as QEMU writes it.
            mended = True if parsed.mended is None else parsed.mended
            return replace(parsed, mini=kind, mended=mended), rest[value.end() if value else 0 :]
    return BadExtension(f"--mini: one of {', '.join(MINI_DUMPS)} expected")


_WITH_VALUE: Mapping[tuple[str, str], tuple[Callable[[str], Any], str]] = {
    ("-dump", "-level"): (parse_dump_level, "dump_level"),
    ("-max", "-bytes"): (parse_size_above_zero, "max_bytes"),
}
"""How a value behind an option is read, and what it says; by the two words of its name."""
_WITH_WORD: Mapping[str, Callable[[DumpLine, str], tuple[DumpLine, str] | BadExtension | None]] = {
    "-live": _take_live,
    "-mini": _take_mini,
}


def _take_string(text: str) -> tuple[str, str]:
    text = text.lstrip()
    if not text:
        raise _QemuRefuses
    if text[0] != '"':
        word = re.match(r"\S+", text)
        size = word.end() if word else 0
        return text[:size], text[size:]
    found, index = [], 1
    while index < len(text) and text[index] != '"':
        character = text[index]
        if character == "\\":
            index += 1
            escape = text[index : index + 1]
            if escape not in _ESCAPES:
                raise _QemuRefuses
            character = _ESCAPES[escape]
        found.append(character)
        index += 1
    if index >= len(text):
        raise _QemuRefuses
    return "".join(found), text[index + 1 :]
