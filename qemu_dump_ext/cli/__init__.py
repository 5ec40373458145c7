"""The command line: `qemu-dump` with its subcommands, and `qemu-dump-guest-memory`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FrameType, ModuleType
from typing import Any

from qemu_dump_ext.cli import subcommands
from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.discovery import collect
from qemu_dump_ext.errors import EXIT_INTERRUPTED, DumpError, SourceError
from qemu_dump_ext.options.dump_options import add_version
from qemu_dump_ext.printable import printable
from qemu_dump_ext.standard_error import tell

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STDERR = 2
_EXIT_SIGPIPE = 128 + signal.SIGPIPE


def run_guarded(program: str, work: Callable[[], int], *, interrupted: str = "") -> int:
    """Run `work`; turn an expected error into one line on stderr and its exit status.

    Args:
        program: What users call it.
        work: Returns the exit status.
        interrupted: What to say of what an interrupted `work` leaves.
    """
    for number in _INTERRUPTS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, partial(_interrupt, program))
    try:
        return work()
    except DumpError as error:
        tell(printable(f"{program}: {error}"))
        return error.exit_status
    except KeyboardInterrupt as error:
        # A note says what could not be cleaned up.
        left = "; ".join(getattr(error, "__notes__", ())) or interrupted
        tell(": ".join(filter(None, (program, "interrupted", left))))
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing more is to be flushed at exit.
        sys.stdout = None
        return _EXIT_SIGPIPE
    except (OSError, MemoryError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "no memory left"
        tell(f"{program}: this host refuses what is needed: {reason}")
        return SourceError.exit_status


def _interrupt(program: str, _number: int, _frame: FrameType | None) -> None:
    # As Ctrl-C: the guest is resumed and the partial dump is removed on the way out, which a
    # second signal does not disturb.
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    if os.isatty(_STDERR):  # at once: a QEMU that does not answer takes its time
        os.write(_STDERR, f"\r{program}: ending, please wait\n".encode())
    raise KeyboardInterrupt


class _SubcommandParser(argparse.ArgumentParser):
    # Gives each subcommand the words as it wants them.
    def __init__(self, commands: Mapping[str, Subcommand], *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description)
        self._commands = commands

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        command = self._commands.get(words[0].replace("-", "_")) if words else None
        if command is not None:
            words[1:] = command.spell_out(words[1:])
        return super().parse_known_args(words, namespace)


def subcommand_parser(
    program: str, description: str, folder: ModuleType
) -> argparse.ArgumentParser:
    """Return the parser of a program of several words, for `run_subcommand`.

    Args:
        program: What users call it.
        description: One line.
        folder: Has one file for each subcommand; `_` in its name is `-` in the word.
    """
    commands = collect(folder, "COMMAND", Subcommand)
    parser = _SubcommandParser(commands, prog=program, description=description)
    add_version(parser)
    choices = parser.add_subparsers(
        title="commands",
        dest="subcommand",
        metavar="COMMAND",
        required=True,
        parser_class=argparse.ArgumentParser,
    )
    for name, command in commands.items():
        word = name.replace("_", "-")
        subparser = choices.add_parser(word, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run_subcommand=command.run)
    return parser


def run_subcommand(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Run the subcommand that the command line names; returns the exit status.

    Args:
        parser: Made by `subcommand_parser`.
        argv: The words behind the program; None: those of this process.
    """
    arguments = parser.parse_args(argv)
    run = partial(arguments.run_subcommand, arguments)
    return run_guarded(f"{parser.prog} {arguments.subcommand}", run)


def tools_parser() -> argparse.ArgumentParser:
    """Return the parser of `qemu-dump`."""
    description = "Look at crash dumps, and at guests to take them from."
    return subcommand_parser("qemu-dump", description, subcommands)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `qemu-dump`; returns the exit status."""
    return run_subcommand(tools_parser(), argv)
