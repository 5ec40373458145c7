"""The line editor of QEMU's human monitor: the same keys, and the same bytes sent back.

Pure: bytes in, bytes out. QEMU echoes every key by moving the cursor back to the prompt and writing
the whole line again; scripts that wait for a prompt have learned to skip exactly that.

Source: QEMU util/readline.c and monitor/hmp.c; compared byte by byte in tests/hmp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qemu_dump_ext.structures.dialect import QemuVersion

PROMPT = b"(qemu) "
LINE_MAX = 4095
HISTORY_MAX = 64
_COMPLETIONS_MAX = 256
_COLUMNS = 80
_LEFT, _RIGHT, _ERASE = b"\x1b[D", b"\x1b[C", b"\x1b[K"
_CLEAR = b"\x1b[2J\x1b[1;1H"
_CONTROL_KEYS_SINCE: QemuVersion = (8, 0, 0)  # ^N, ^P and ^U; 7.2 ignores them, 11.1 has them
_CSI = 0x9B

Completer = Callable[[str], tuple[Sequence[str], int]]
"""Gets the line up to the cursor; returns what may stand there, and how much of it is typed."""


def no_completions(_text: str) -> tuple[Sequence[str], int]:
    """Complete nothing."""
    return (), 0


class LineEditor:
    """One client's line and history.

    Attributes:
        prompt: Shown before a line.
        history: Lines that were entered, the oldest first, no two alike.
    """

    def __init__(self, version: QemuVersion, complete: Completer = no_completions) -> None:
        self.prompt = PROMPT
        self.history: list[bytes] = []
        self._complete = complete
        self._line = bytearray()
        self._cursor = 0
        self._shown = b""
        self._shown_cursor = 0
        self._history_index = -1
        self._escape: list[int] | None = None
        self._output = bytearray()
        self._keys: dict[int, Callable[[], None]] = {
            1: self._to_start,
            4: self._delete,
            5: self._to_end,
            8: self._backspace,
            9: self._tab,
            12: self._clear_screen,
            23: self._delete_word,
            127: self._backspace,
        }
        self.set_version(version)

    def set_version(self, version: QemuVersion) -> None:
        """Have the keys of this version of QEMU."""
        newer: dict[int, Callable[[], None]] = {14: self._down, 16: self._up, 21: self._kill}
        for key, action in newer.items():
            if version >= _CONTROL_KEYS_SINCE:
                self._keys[key] = action
            else:
                self._keys.pop(key, None)

    @property
    def pending(self) -> int:
        """Bytes of output that have not been taken."""
        return len(self._output)

    def take_output(self) -> bytes:
        """Return what the client is to see, and forget it."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def show_prompt(self) -> None:
        """Begin a line."""
        self._output += self.prompt
        self._shown, self._shown_cursor, self._escape = b"", 0, None

    def show_again(self, text: bytes) -> None:
        """Show `text` above the line that is being edited."""
        self._output += b"\r" + _ERASE + text
        self.show_prompt()
        self._update()

    def feed(self, key: int) -> bytes | None:
        """Handle one byte; return the line if this ends it."""
        entered = None
        if self._escape is not None:
            self._feed_escape(key)
        elif key in {10, 13}:
            entered = self._enter()
        elif key == 27:
            self._escape = []
        elif key == _CSI:
            self._escape = [ord("[")]
        elif key in self._keys:
            self._keys[key]()
        elif key >= 32:
            self._insert(bytes((key,)))
        self._update()
        return entered

    def _enter(self) -> bytes:
        line = bytes(self._line)
        if line:
            if line in self.history:
                self.history.remove(line)
            self.history.append(line)
            del self.history[:-HISTORY_MAX]
            self._history_index = -1
        self._output += b"\r\n"
        self._line.clear()
        self._cursor = 0
        self._shown, self._shown_cursor = b"", 0
        return line

    def _feed_escape(self, key: int) -> None:
        sequence, self._escape = self._escape or [], None
        if not sequence:
            if key in b"[O":
                self._escape = [key]
        elif sequence[0] == ord("O"):
            actions = {ord("F"): self._to_end, ord("H"): self._to_start}
            if key in actions:
                actions[key]()
        elif chr(key).isdecimal() and key < 128:
            self._escape = [*sequence, key][:8]
        else:
            self._control_sequence(chr(key), bytes(sequence[1:]))

    def _control_sequence(self, final: str, parameter: bytes) -> None:
        if final == "~":
            named = {b"1": self._to_start, b"3": self._delete, b"4": self._to_end}
            action = named.get(parameter.lstrip(b"0"))
        else:
            action = {
                "A": self._up,
                "F": self._up,
                "B": self._down,
                "E": self._down,
                "C": self._forward,
                "D": self._backward,
            }.get(final)
        if action is not None:
            action()

    def _update(self) -> None:
        line = bytes(self._line)
        if line != self._shown:
            self._output += _LEFT * self._shown_cursor + line + _ERASE
            self._shown, self._shown_cursor = line, len(line)
        distance = self._cursor - self._shown_cursor
        self._output += _RIGHT * distance if distance > 0 else _LEFT * -distance
        self._shown_cursor = self._cursor

    def _insert(self, text: bytes) -> None:
        room = LINE_MAX - len(self._line)
        text = text[:room]
        self._line[self._cursor : self._cursor] = text
        self._cursor += len(text)

    def _to_start(self) -> None:
        self._cursor = 0

    def _to_end(self) -> None:
        self._cursor = len(self._line)

    def _forward(self) -> None:
        self._cursor = min(self._cursor + 1, len(self._line))

    def _backward(self) -> None:
        self._cursor = max(self._cursor - 1, 0)

    def _delete(self) -> None:
        del self._line[self._cursor : self._cursor + 1]

    def _backspace(self) -> None:
        if self._cursor:
            self._cursor -= 1
            self._delete()

    def _delete_word(self) -> None:
        if not self._cursor:
            return
        before = bytes(self._line[: self._cursor])
        word_end = len(before.rstrip(b" \t\n\v\f\r"))
        start = max(before.rfind(blank, 0, word_end) for blank in (b" ", b"\t", b"\v", b"\f")) + 1
        del self._line[start : self._cursor]
        self._cursor = start

    def _clear_screen(self) -> None:
        self._output += _CLEAR
        self.show_prompt()

    def _kill(self) -> None:
        self._line.clear()
        self._cursor = 0

    def _show_line(self, line: bytes) -> None:
        self._line[:] = line
        self._cursor = len(line)

    def _up(self) -> None:
        if self._history_index == 0 or not self.history:
            return
        if self._history_index == -1:
            self._history_index = len(self.history)
        self._history_index -= 1
        self._show_line(self.history[self._history_index])

    def _down(self) -> None:
        if self._history_index == -1:
            return
        self._history_index += 1
        if self._history_index < len(self.history):
            self._show_line(self.history[self._history_index])
        else:
            self._history_index = -1
            self._show_line(b"")

    def _tab(self) -> None:
        found, typed = self._complete(bytes(self._line[: self._cursor]).decode("utf-8", "replace"))
        words = [word.encode() for word in sorted(found)[:_COMPLETIONS_MAX]]
        if not words:
            return
        if len(words) == 1:
            self._insert(words[0][typed:])
            if not words[0].endswith(b"/"):
                self._insert(b" ")
            return
        self._output += b"\r\n"
        self._insert(_common_prefix(words)[typed:])
        width = min(max(max(map(len, words)) + 2, 10), _COLUMNS)
        per_row = _COLUMNS // width
        for first in range(0, len(words), per_row):
            row = words[first : first + per_row]
            self._output += b"".join(word.ljust(width) for word in row) + b"\r\n"
        self.show_prompt()


def _common_prefix(words: Sequence[bytes]) -> bytes:
    low, high = min(words), max(words)
    size = 0
    while size < min(len(low), len(high)) and low[size] == high[size]:
        size += 1
    return low[:size]
