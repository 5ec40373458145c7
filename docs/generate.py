"""Write what is generated: parts of the pages in docs/, manual pages, completions, help in gdb.

    python -m docs.generate

A part of a page stands between `<!-- NAME: generated -->` and `<!-- end of NAME -->`. Needs the
packages of the extra `test`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

from hmp.proxy import proxy_parser
from qemu_dump_ext import __version__
from qemu_dump_ext.cli import tools_parser
from qemu_dump_ext.cli.crash_collector_command import collector_parser
from qemu_dump_ext.cli.dump_command import dump_parser
from qemu_dump_ext.cli.subcommands.targets import table_of_targets
from qemu_dump_ext.crash_collector.config import settings
from qemu_dump_ext.options.gdb_commands import GDB_COMMANDS, gdb_help
from tests.oracle import known_differences

ROOT = Path(__file__).resolve().parents[1]
PARSERS: Mapping[str, Callable[[], argparse.ArgumentParser]] = {
    "qemu-crash-collector": collector_parser,
    "qemu-dump": tools_parser,
    "qemu-dump-guest-memory": dump_parser,
    "qemu-hmp-proxy": proxy_parser,
}
"""Every program that is installed."""

_GIB = 1 << 30
_LINE_WIDTH = "100"
_TERMINAL_WIDTH = "80"
_FILES = {"FILE", "SOCKET", "MONITOR", "PATH", "ADDRESS"}
_DIRECTORIES = {"DIR"}
_GUESTS = {
    "bash": "_qemu_dump_guests",
    "zsh": "_qemu_dump_guests",
    "fish": "(qemu-dump guests --names 2>/dev/null)",
}
_GUEST_FUNCTIONS = {
    "bash": """
_qemu_dump_guests() {
  compgen -W "$(qemu-dump guests --names 2>/dev/null)" -- "$1"
}
""",
    "zsh": """
_qemu_dump_guests() {
  compadd -- ${(f)"$(qemu-dump guests --names 2>/dev/null)"}
}
""",
}
"""Complete the names of guests, for which the host is asked when the key is pressed."""
_COMPLETIONS = {
    "bash": "docs/share/bash-completion/completions/{}",
    "zsh": "docs/share/zsh/site-functions/_{}",
    "fish": "docs/share/fish/vendor_completions.d/{}.fish",
}


def generated_files() -> dict[Path, str]:
    """Return the content of every file that is generated, or has a generated part, by its path."""
    # argparse asks for the width.
    os.environ["COLUMNS"] = _TERMINAL_WIDTH
    files = {ROOT / f"gdb/help/{name}.txt": gdb_help(name) for name in GDB_COMMANDS}
    os.environ["COLUMNS"] = _LINE_WIDTH
    for program, parser_of in PARSERS.items():
        files[ROOT / f"docs/share/man/man1/{program}.1"] = _manual_page(parser_of())
        for shell, path in _COMPLETIONS.items():
            files[ROOT / path.format(program)] = _completion(parser_of(), shell)
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text("utf-8")
        filled = _fill(text)
        if filled != text or "generated -->" in text:
            files[page] = filled
    return files


def _manual_page(parser: argparse.ArgumentParser) -> str:
    page = Manpage(parser, format="single-commands-section")
    description = str(parser.description).removesuffix(".")
    begins_as_a_word = description[1:2].islower()
    page.description = (
        description[:1].lower() + description[1:] if begins_as_a_word else description
    )
    page.date = ""
    page.source = f"qemu_dump_ext {__version__}"
    page.manual = "Crash dumps of QEMU guests"
    others = (name for name in PARSERS if name != parser.prog)
    page.add_section("see also", "=", ",\n".join(f".BR {_escape(name)} (1)" for name in others))
    return str(page)


def _escape(text: str) -> str:
    return text.replace("-", r"\-")


def _completion(parser: argparse.ArgumentParser, shell: str) -> str:
    _mark_paths(parser)
    text: str = shtab.complete(parser, shell)
    if _GUESTS.get(shell, "") in text:
        text = shtab.complete(parser, shell, preamble=_GUEST_FUNCTIONS.get(shell, ""))
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def _mark_paths(parser: argparse.ArgumentParser) -> None:
    # shtab looks for an attribute that says what an argument is.
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for subparser in action.choices.values():
                _mark_paths(subparser)
        elif action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest == "guest" and "--pid" in parser._option_string_actions:  # noqa: SLF001
            action.complete = _GUESTS  # type: ignore[attr-defined]


def _fill(page: str) -> str:
    for name, part in PARTS.items():
        begin, end = f"<!-- {name}: generated -->\n", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        if found:
            _, closed, behind = rest.partition(end)
            if not closed:
                raise ValueError(f"{end} is missing")
            page = before + begin + "\n" + "\n".join(part()) + "\n\n" + end + behind
    return page


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    rows = [
        (f"`{_words_of(action)}`", _help_of(parser, action)) for action in _arguments_of(parser)
    ]
    return _table(("option", "meaning"), rows)


def _subcommands(parser: argparse.ArgumentParser) -> Iterator[str]:
    (choices,) = (action for action in _arguments_of(parser) if action.dest == "subcommand")
    rows = [
        (
            f"`{word}`",
            str(subparser.description),
            ", ".join(f"`{_words_of(action)}`" for action in _arguments_of(subparser)),
        )
        for word, subparser in dict(choices.choices or {}).items()
    ]
    return _table(("command", "what it does", "arguments"), rows)


def _arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    actions = parser._actions  # noqa: SLF001 - argparse has no other way
    return [action for action in actions if "--help" not in action.option_strings]


def _words_of(action: argparse.Action) -> str:
    choices = "|".join(map(str, action.choices or ()))
    if not action.option_strings:
        return choices or str(action.metavar or action.dest)
    metavar = action.metavar or choices or action.dest.upper()
    value = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    words = ", ".join(action.option_strings)
    return words if action.nargs == 0 else f"{words} {value}"


def _help_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action)  # noqa: SLF001 - argparse has no other way


def _settings() -> Iterator[str]:
    headings = {
        "The whole file": settings.Configuration,
        "`defaults`, and each of `guests`": settings.Settings,
        "Each of `guests` besides": settings.GuestEntry,
        "`heartbeat`": settings.Heartbeat,
        "`rate`": settings.Rate,
        "`keep`": settings.Keep,
        "`symbols`": settings.Symbols,
        "`after`, where it is a command": settings.AfterCommand,
        "`limits`": settings.Limits,
        "`upload`": settings.Upload,
        "Each of `notify`": settings.Notification,
    }
    inherited = {field.name for field in dataclasses.fields(settings.Settings)}
    for index, (heading, declared) in enumerate(headings.items()):
        meanings = attribute_meanings(declared)
        rows = [
            (
                f"`{field.name}`",
                _default_of(field),
                meanings[field.name] + _choices_of(field, declared),
            )
            for field in dataclasses.fields(declared)
            if declared is not settings.GuestEntry or field.name not in inherited
        ]
        yield from ([""] if index else [])
        yield f"### {heading}"
        yield ""
        yield from _table(("word", "default", "meaning"), rows)


def attribute_meanings(declared: type) -> dict[str, str]:
    """Return what the docstring of a dataclass says of each attribute."""
    # Its indentation depends on the version of Python.
    _, _, attributes = inspect.cleandoc(declared.__doc__ or "").partition("Attributes:\n")
    meanings: dict[str, str] = {}
    name = ""
    for line in attributes.splitlines():
        if match := re.fullmatch(r" {4}(\w+): (.*)", line):
            name = match[1]
            meanings[name] = match[2]
        elif line.startswith(" " * 8):
            meanings[name] += " " + line.strip()
    return meanings


def _default_of(field: dataclasses.Field[object]) -> str:
    match field.default:
        case dataclasses.MISSING if field.default_factory is dataclasses.MISSING:
            return "required"
        case None | dataclasses.MISSING:
            return "-"
        case tuple() as words:
            return ", ".join(f"`{getattr(word, 'pattern', word)}`" for word in words) or "-"
        case float() as seconds:
            return f"{seconds:g} s"
        case int() as size if size >= _GIB:
            return f"{size // _GIB} GiB"
    word = str(field.default)
    return f"`{word.lower() if isinstance(field.default, bool) else word}`"


def _choices_of(field: dataclasses.Field[object], declared: type) -> str:
    hint = typing.get_type_hints(declared)[field.name]
    words = ", ".join(f"`{word}`" for word in _literals(hint))
    how_many = "Any" if typing.get_origin(hint) is tuple else "One"
    return f" {how_many} of {words}." if words else ""


def _literals(hint: object) -> Iterator[str]:
    if typing.get_origin(hint) is typing.Literal:
        yield from map(str, typing.get_args(hint))
    else:
        for part in typing.get_args(hint):
            yield from _literals(part)


def _differences() -> Iterator[str]:
    rows = []
    for name, differences in vars(known_differences).items():
        if name.startswith("_") or not isinstance(differences, dict):
            continue
        fields_of: dict[str, list[str]] = {}
        for field, reason in differences.items():
            fields_of.setdefault(reason, []).append(f"`{field}`")
        kind = name.lower().replace("_", ", ")
        rows += [(kind, ", ".join(fields), reason) for reason, fields in fields_of.items()]
    return _table(("dump", "what differs", "why"), rows)


PARTS: Mapping[str, Callable[[], Iterable[str]]] = {
    "options of qemu-dump-guest-memory": lambda: _options(dump_parser()),
    "options of qemu-hmp-proxy": lambda: _options(proxy_parser()),
    "commands of qemu-dump": lambda: _subcommands(tools_parser()),
    "commands of qemu-crash-collector": lambda: _subcommands(collector_parser()),
    "settings of the crash collector": _settings,
    "table of targets": table_of_targets,
    "named differences": _differences,
}
"""What a page in docs/ may have generated, by name: the lines of Markdown."""


def main() -> None:
    """Write all files that are not as they would be generated; tell which."""
    for path, content in generated_files().items():
        if not path.is_file() or path.read_text("utf-8") != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, "utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
