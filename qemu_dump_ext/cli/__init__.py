"""The command line: `qemu-dump` with its subcommands, and `qemu-dump-guest-memory`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType, ModuleType
from typing import Any

from qemu_dump_ext import __version__
from qemu_dump_ext.cli import subcommands
from qemu_dump_ext.cli._declaration import Program, Subcommand
from qemu_dump_ext.discovery import collect, names
from qemu_dump_ext.errors import (
    EXIT_INTERRUPTED,
    EXIT_SUCCESS,
    DumpError,
    RequestError,
    SourceError,
)
from qemu_dump_ext.host_limits import require_room
from qemu_dump_ext.options.parsers import OneLineParser, PlainParser, epilog_of
from qemu_dump_ext.printable import printable
from qemu_dump_ext.standard_error import tell

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STDERR = 2
_EXIT_SIGPIPE = 128 + signal.SIGPIPE


def run_guarded(
    program: str, work: Callable[[], int], *, interrupted: str = "", as_json: bool = False
) -> int:
    """Run `work`; turn an expected error into one line on stderr and its exit status.

    Args:
        program: What users call it.
        work: Returns the exit status.
        interrupted: What to say of what an interrupted `work` leaves.
        as_json: Say it on standard output as well, as one object of JSON.
    """
    for number in _INTERRUPTS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, partial(_interrupt, program))
    try:
        require_room()
        return work()
    except DumpError as error:
        tell(printable(f"{program}: {error}"))
        if as_json:
            _tell_program(error.message, error.hint, error.exit_status)
        return error.exit_status
    except KeyboardInterrupt as error:
        # A note says what could not be cleaned up.
        left = "; ".join(getattr(error, "__notes__", ())) or interrupted
        tell(": ".join(filter(None, (program, "interrupted", left))))
        if as_json:
            _tell_program("interrupted", left or None, EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing more is to be flushed at exit.
        sys.stdout = None
        return _EXIT_SIGPIPE
    except (OSError, MemoryError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "no memory left"
        tell(f"{program}: this host refuses what is needed: {reason}")
        if as_json:
            _tell_program(
                f"this host refuses what is needed: {reason}", None, SourceError.exit_status
            )
        if isinstance(error, MemoryError):
            # Everything is undone by now. Python's own way out needs memory: where a thread is
            # left, the C library ends the process by an abort, or waits for it.
            os._exit(SourceError.exit_status)
        return SourceError.exit_status


def _tell_program(message: str, hint: str | None, exit_status: int) -> None:
    text = json.dumps({"error": message, "hint": hint, "exit_status": exit_status})
    try:
        print(text, flush=True)
    except (OSError, ValueError, AttributeError):  # nobody reads it; the status says it too
        sys.stdout = None


def wants_json(argv: Sequence[str] | None) -> bool:
    """Tell whether the words of a command line, or of this process, ask for JSON."""
    words = sys.argv[1:] if argv is None else argv
    return "--json" in words


def is_version_wanted(argv: Sequence[str] | None) -> bool:
    """Tell whether a command line, or that of this process, asks for the version alone."""
    return list(sys.argv[1:] if argv is None else argv) == ["--version"]


def _interrupt(program: str, _number: int, _frame: FrameType | None) -> None:
    # As Ctrl-C: the guest is resumed and the partial dump is removed on the way out, which a
    # second signal does not disturb.
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    if os.isatty(_STDERR):  # at once: a QEMU that does not answer takes its time
        os.write(_STDERR, f"\r{program}: ending, please wait\n".encode())
    raise KeyboardInterrupt


class _ProgramParser(OneLineParser):
    # Gives each subcommand the words as it wants them.
    def __init__(
        self,
        commands: Mapping[str, Subcommand | Program],
        *,
        prog: str,
        description: str,
        epilog: str,
    ) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog)
        self._commands = commands

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        command = self._commands.get(words[0].replace("-", "_")) if words else None
        if isinstance(command, Subcommand):
            words[1:] = command.spell_out(words[1:])
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse words; what nobody knows is told of the subcommand that it was said to."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise RequestError(
                f"unrecognized arguments: {' '.join(unknown)}",
                hint=f"'{self.prog} {found.subcommand} --help' shows the options",
            )
        return found


def subcommand_parser(
    program: str, description: str, folder: ModuleType, *, only: str | None = None
) -> argparse.ArgumentParser:
    """Return the parser of a program of several words, for `run_program`.

    Args:
        program: What users call it.
        description: One line.
        folder: Has one file for each subcommand; `_` in its name is `-` in the word.
        only: Import and know only the file of this name; None: all.
    """
    commands = _commands(folder, only)
    parser = _ProgramParser(
        commands,
        prog=program,
        description=description,
        epilog=epilog_of(program, ["COMMAND --help    # options and examples of each"]),
    )
    choices = parser.add_subparsers(
        title="commands",
        dest="subcommand",
        metavar="COMMAND",
        required=True,
        parser_class=PlainParser,
    )
    for name, command in commands.items():
        word = name.replace("_", "-")
        if isinstance(command, Program):
            choices.add_parser(
                word, help=command.help, description=command.help, add_help=False
            ).add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="its own options")
            continue
        subparser = choices.add_parser(
            word,
            help=command.help,
            description=command.help,
            epilog=epilog_of(f"{program} {word}", command.examples, command.statuses),
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run_subcommand=command.run)
    return parser


def _commands(folder: ModuleType, only: str | None) -> Mapping[str, Subcommand | Program]:
    return collect(folder, "COMMAND", (Subcommand, Program), only)


def _named(folder: ModuleType, words: Sequence[str]) -> str | None:
    """Return the file of the subcommand that a command line names, or None."""
    name = words[0].replace("-", "_") if words else ""
    with suppress(OSError):  # which is told later
        if name in names(folder):
            return name
    return None


def run_program(
    program: str, description: str, folder: ModuleType, argv: Sequence[str] | None
) -> int:
    """Run the subcommand that the command line names; returns the exit status.

    Args:
        program: What users call it.
        description: One line.
        folder: As of `subcommand_parser`.
        argv: The words behind the program; None: those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if is_version_wanted(words):
        print(f"{program} {__version__}")
        return EXIT_SUCCESS
    # What is not named is not imported: most of the time a command takes to start is that.
    only = _named(folder, words)
    if only is not None:
        command = _commands(folder, only)[only]
        if isinstance(command, Program):
            return command.main(words[1:], f"{program} {words[0]}")

    def run() -> int:
        parser = subcommand_parser(program, description, folder, only=only)
        arguments = parser.parse_args(words)
        status: int = arguments.run_subcommand(arguments)
        return status

    told = f"{program} {words[0]}" if only else program
    return run_guarded(told, run, as_json=wants_json(words))


_DESCRIPTION = "Take crash dumps of QEMU guests, and look at them."


def tools_parser() -> argparse.ArgumentParser:
    """Return the parser of `qemu-dump`."""
    return subcommand_parser("qemu-dump", _DESCRIPTION, subcommands)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `qemu-dump`; returns the exit status."""
    return run_program("qemu-dump", _DESCRIPTION, subcommands, argv)
