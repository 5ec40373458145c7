"""Take apart the text of QEMU's `info registers`."""

from __future__ import annotations

import re


def parse_rows(text: str, prefix: str, name: str, count: int) -> dict[str, int]:
    """Parse rows of `info registers` of the form `GPR04 value value value value`.

    Args:
        text: The registers of one vCPU.
        prefix: What stands in front of the number of the first register of a row.
        name: Ours, to which the number is appended.
        count: How many registers there are at most.
    """
    values: dict[str, int] = {}
    for first, row in re.findall(rf"^ *{prefix}(\d+):?((?: +[0-9a-f]+)+) *$", text, re.MULTILINE):
        for index, value in enumerate(row.split(), int(first)):
            if index < count:
                values[f"{name}{index}"] = int(value, 16)
    return values


def parse_named_values(text: str) -> dict[str, int]:
    """Parse every `NAME=hexadecimal` of a register dump."""
    return {
        name: int(value, 16)
        for name, value in re.findall(r"\b([A-Z][A-Z0-9_]*) *= *([0-9a-fA-F]+)\b", text)
    }
