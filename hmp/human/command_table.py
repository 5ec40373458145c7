"""What QEMU's monitor knows, learned from its own `help`: for completion, and to add to its help.

Pure, except that file names are completed by looking into the directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path

from qemu_dump_ext.value import Value

_ENTRY = re.compile(r"^(?P<names>[\w?|.-]+) (?P<parameters>.*?) ?-- ", re.ASCII)
_INFO_PREFIX = "info "
_WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\S+)')
_FILE_PARAMETER = re.compile(r"\b(file|filename|target)\b")
_NAMES_A_FILE = frozenset(("commit", "screendump"))

DUMP_COMMAND = "dump-guest-memory"
CANCEL_COMMAND = "dump-cancel"
_DUMP_PARAMETERS = "[-p] [-d] [-z|-l|-s|-w] [-R] filename [begin length]"
_RAW_HELP = "-R: when using kdump (-z, -l, -s), use raw rather than makedumpfile-flattened"
_OUR_HELP = (
    "taken by qemu-hmp-proxy; it also knows, before filename:",
    "-z {codecs}: kdump-compressed with that codec",
    "--mended: as readers want it, instead of byte for byte as QEMU writes it",
    "--dump-level N: leave out pages as makedumpfile -d N does",
    "--mini, --mini=smallest: what triage needs, in a small kdump",
    "--max-bytes SIZE: at the lowest dump level that fits, and rather none than a larger one",
    "--snapshot: copy guest memory, let the guest run, write the copy",
    "--live: the guest runs while QEMU streams it; --live=prefer: --snapshot where it cannot",
    "--memory NAME: where guest memory comes from",
    "--native: QEMU's own dump-guest-memory",
)
CANCEL_HELP = f"{CANCEL_COMMAND}  -- cancel the dump that is in process"


class CommandTable(Value):
    """Commands and sub-commands by each of their names; the values are their parameters."""

    commands: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, str] = field(default_factory=dict)

    def complete(self, text: str, directory: Path) -> tuple[Sequence[str], int]:
        """Return what may stand at the end of `text`, and how much of it is there already."""
        words = [match[1] for match in _WORD.finditer(text)]
        if not text or text[-1].isspace():
            words.append("")
        table, last = self.commands, words[-1]
        if len(words) == 2 and words[0] in {"help", "?"}:
            return _starting(table, last), len(last)
        if words[0] in {"help", "?"} and len(words) > 1:
            words = words[1:]
        if words[0] == "info" and len(words) > 1:
            table, words = self.info, words[1:]
        if len(words) == 1:
            return _starting(table, last), len(last)
        parameters = table.get(words[0], "")
        if not (_FILE_PARAMETER.search(parameters) or words[0] in _NAMES_A_FILE):
            return (), 0
        typed = last.removeprefix('"')
        quote = last[: len(last) - len(typed)]
        return [quote + name for name in complete_file(typed, directory)], len(last)


def parse_help(text: str, prefix: str = "") -> dict[str, str]:
    """Parse the answer of `help`, or of `help info` with its prefix: parameters by each name."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = _ENTRY.match(line.removeprefix(prefix))
        if match:
            found |= dict.fromkeys(match["names"].split("|"), match["parameters"])
    return found


def parse_tables(help_text: str, info_text: str) -> CommandTable:
    """Turn the answers of `help` and `help info` into tables."""
    ours = {CANCEL_COMMAND: "", DUMP_COMMAND: _DUMP_PARAMETERS, "info": "[subcommand]"}
    return CommandTable(parse_help(help_text) | ours, parse_help(info_text, _INFO_PREFIX))


def complete_file(typed: str, directory: Path) -> list[str]:
    """Return every name in the directory of `typed` that begins so; directories end in a slash."""
    folder, slash, beginning = typed.rpartition("/")
    where = directory / (folder + slash)
    try:
        names = sorted(path.name for path in where.iterdir() if path.name.startswith(beginning))
    except OSError:
        return []
    return [folder + slash + name + ("/" if (where / name).is_dir() else "") for name in names]


def _starting(table: Mapping[str, str], beginning: str) -> list[str]:
    return [name for name in table if name.startswith(beginning)]


def with_our_help(text: str, codecs: Sequence[str]) -> str:
    """Put what we add into QEMU's help, in place: whole, or of dump-guest-memory alone.

    Args:
        text: QEMU's answer, with CR LF or LF.
        codecs: The words behind -z.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.split(newline)
    start = next((i for i, line in enumerate(lines) if line.startswith(DUMP_COMMAND + " ")), None)
    if start is None:
        return text
    end = start + 1
    while end < len(lines) and lines[end].startswith("\t"):
        end += 1
    entry = lines[start:end]
    head, dashes, rest = entry[0].partition(" -- ")
    if "-R" not in head:
        entry[0] = f"{DUMP_COMMAND} {_DUMP_PARAMETERS}{dashes}{rest}"
        entry += ["\t\t\t" + _RAW_HELP, "\t\t\t    format"]
    entry += ["\t\t\t" + line.format(codecs="|".join(codecs)) for line in _OUR_HELP]
    if len(lines) > end + 1:
        entry.insert(0, CANCEL_HELP)
    lines[start:end] = entry
    return newline.join(lines)
