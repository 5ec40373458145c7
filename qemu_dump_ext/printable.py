"""Text of guests, of QEMU and of files, as a terminal may show it."""

from __future__ import annotations


def printable(text: str, *, keep: str = "\n\t") -> str:
    """Return text in which what is not printable is shown by its number in hexadecimal digits.

    Guests choose what is on their console and in their log, and so in many a message: what a
    terminal would obey, or show in another order than it is written, must not reach it.

    Args:
        text: Anything.
        keep: Characters that are left although they are not printable.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else f"\\u{ord(c):04x}" for c in text)
