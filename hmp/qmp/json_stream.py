"""Cut a stream of bytes into JSON values as QEMU's monitor does. Pure.

QEMU takes values one behind the other, with any white space or none in between, and strings in
single quotes as well.

Source: QEMU qobject/json-lexer.c, json-streamer.c; docs/interop/qmp-spec.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from qemu_dump_ext.value import Value

_SIZE_MAX = 16 << 20
_NESTING_MAX = 1024
_OUTSIDE = re.compile(rb"[{}\[\]\"'\xff]")
_KEYWORD = re.compile(r"[a-z]+")
_NO_SPACE = re.compile(rb"\S")
_IN_STRING = {ord('"'): re.compile(rb'["\\\n\xff]'), ord("'"): re.compile(rb"['\\\n\xff]")}
_SINGLE_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'((?:[^'\\]|\\.)*)'", re.DOTALL)
_RESYNCHRONISE = 0xFF
"""A client that does not know what QEMU has read already sends this byte, which no JSON has."""


class JsonError(Value):
    """Something that is no JSON.

    Attributes:
        message: What QEMU says.
    """

    message: str


class JsonStream:
    """Takes bytes as they come, gives values as they are complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._quote: int | None = None

    def feed(self, data: bytes) -> Iterator[Any | JsonError]:
        """Yield every value that `data` completes."""
        self._buffer += data
        while (end := self._find_end()) is not None:
            text = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._reset()
            yield from _parse(text)
        if len(self._buffer) > _SIZE_MAX:
            self._buffer.clear()
            self._reset()
            yield JsonError("JSON token size limit exceeded")

    def _reset(self) -> None:
        self._scanned, self._depth, self._quote = 0, 0, None

    def _find_end(self) -> int | None:
        # Returns where a value, or something that is none, ends.
        while (position := self._next_mark()) is not None:
            byte = self._buffer[position]
            self._scanned = position + 1
            if byte in {_RESYNCHRONISE, ord("\n")}:
                return position + 1
            if self._quote is not None:
                self._step_in_string(byte)
            elif not self._depth and byte not in b"{[":
                return self._end_of_word(position)
            elif self._ends_value(byte):
                return position + 1
        return None

    def _next_mark(self) -> int | None:
        if self._quote is not None:
            pattern = _IN_STRING[self._quote]
        else:
            pattern = _OUTSIDE if self._depth else _NO_SPACE
        match = pattern.search(self._buffer, self._scanned)
        if match is None:
            # Behind a backslash that ends the buffer, the next byte is skipped all the same.
            self._scanned = max(self._scanned, len(self._buffer))
        return None if match is None else match.start()

    def _step_in_string(self, byte: int) -> None:
        if byte == ord("\\"):
            self._scanned += 1
        else:
            self._quote = None

    def _ends_value(self, byte: int) -> bool:
        if byte in b"\"'":
            self._quote = byte
        elif byte in b"{[":
            self._depth += 1
        else:
            self._depth -= 1
        return not 0 < self._depth <= _NESTING_MAX

    def _end_of_word(self, position: int) -> int | None:
        # A scalar or garbage where an object should begin: up to the end of the line.
        newline = self._buffer.find(b"\n", position)
        self._scanned = position
        return newline + 1 if newline >= 0 else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _parse(text: bytes) -> Iterator[Any | JsonError]:
    text = text.strip()
    if text == bytes((_RESYNCHRONISE,)) or not text:
        if text:
            yield JsonError("JSON parse error, stray '\\xFF'")
        return
    try:
        decoded = _SINGLE_QUOTED.sub(_in_double_quotes, text.decode())
        value = json.loads(decoded, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        yield _bad_json(text)
    else:
        yield _bad_json(text) if "\\u0000" in decoded else value


def _bad_json(text: bytes) -> JsonError:
    shown = text[:40].decode("utf-8", "replace")
    if _KEYWORD.fullmatch(shown):
        return JsonError(f"JSON parse error, invalid keyword '{shown}'")
    return JsonError(f"JSON parse error, invalid input '{shown}'")


def _in_double_quotes(match: re.Match[str]) -> str:
    if match[1] is None:
        return match[0]
    return '"' + match[1].replace("\\'", "'").replace('"', '\\"') + '"'
