"""The one place where the package's world and gdb's meet: errors, arguments, selection."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gdb
from qemu_dump_ext.errors import EXIT_INTERRUPTED, EXIT_SUCCESS, DumpError
from qemu_dump_ext.options.gdb_commands import gdb_parser
from qemu_dump_ext.options.parsers import OneLineParser
from qemu_dump_ext.printable import printable
from qemu_dump_ext.progress import OneLine, ProgressMeter

_STATUS_VARIABLE = "_qemu_dump_status"
_PATHS_MAX = 1000


class _HelpWanted(Exception):  # noqa: N818 - leaves the parser, is no error
    pass


class GdbParser(OneLineParser):
    """Never ends gdb's process, and prints through gdb."""

    def print_help(self, file: object = None) -> None:
        """Print the help to gdb's standard output."""
        gdb.write(self.format_help())

    def exit(self, status: int = 0, message: str | None = None) -> None:  # type: ignore[override]
        """Leave the command after --help."""
        raise _HelpWanted(message)


def command_parser(name: str) -> GdbParser:
    """Return the parser of one of our commands."""
    return gdb_parser(name, GdbParser)


class QemuCommand:
    """What a command of gdb's does and completes.

    Its result is in the convenience variable $_qemu_dump_status, as an exit status.
    """

    def __init__(
        self,
        run: Callable[[Sequence[str]], int],
        complete: Callable[[Sequence[str], str], Sequence[str] | None],
        *,
        interrupted: str = "",
    ) -> None:
        """Prepare.

        Args:
            run: Gets the words behind the command, returns an exit status.
            complete: Gets the words before the last one, and the beginning of the last one;
                returns words, or None to complete file names.
            interrupted: What to say of what the command leaves when it is interrupted.
        """
        self._interrupted = interrupted
        self._run = run
        self._complete = complete

    def invoke(self, argument: str) -> None:
        """Run; an expected error becomes one line."""
        try:
            status = self._run(gdb.string_to_argv(argument))
        except _HelpWanted:
            status = EXIT_SUCCESS
        except DumpError as error:
            _set_status(error.exit_status)
            raise gdb.GdbError(printable(str(error))) from error
        except KeyboardInterrupt as error:
            _set_status(EXIT_INTERRUPTED)
            left = "; ".join(getattr(error, "__notes__", ())) or self._interrupted
            said = ": ".join(filter(None, ("interrupted", left)))
            raise gdb.GdbError(said) from error
        _set_status(status)

    def complete(self, text: str, word: str | None) -> Sequence[str]:
        """Complete options and their values."""
        if word is None:
            return ()  # gdb asks where words end; newer ones print what is raised then
        words = text.split(" ")
        found = self._complete(words[:-1], words[-1])
        if found is None:
            found = _paths(words[-1])
        # gdb wants only what follows its own idea of where a word begins.
        known = len(words[-1]) - len(word)
        return [choice[known:] for choice in found if choice.startswith(words[-1])]


def _paths(begun: str) -> Sequence[str]:
    """Return the paths that begin like this: gdb itself takes the whole line for one path."""
    directory, _, name = begun.rpartition("/")
    folder = Path(f"{directory}/").expanduser() if "/" in begun else Path()
    try:
        with os.scandir(folder) as entries:
            found = [
                f"{begun[: len(begun) - len(name)]}{entry.name}{'/' if entry.is_dir() else ''}"
                for entry in entries
                if entry.name.startswith(name) and (name or not entry.name.startswith("."))
            ]
    except OSError:
        return []
    return sorted(found)[:_PATHS_MAX]


def _set_status(status: int) -> None:
    gdb.set_convenience_variable(_STATUS_VARIABLE, status)


@contextmanager
def selection_kept() -> Iterator[None]:
    """Give the user the selected thread and frame back."""
    thread = gdb.selected_thread()
    frame = None
    with contextlib.suppress(gdb.error):  # where gdb finds none in memory that is not there
        frame = gdb.selected_frame()
    try:
        yield
    finally:
        if thread.is_valid():
            thread.switch()
            if frame is not None and frame.is_valid():
                frame.select()


def option_words(name: str) -> list[str]:
    """Return every option that one of our commands knows."""
    return sorted(
        option
        for action in command_parser(name)._actions  # noqa: SLF001 - argparse has no other way
        for option in action.option_strings
    )


@contextmanager
def shown_progress(choice: str) -> Iterator[ProgressMeter]:
    """Show progress until the end of the block, however it ends; nothing of it is left.

    Args:
        choice: `auto`, `always`, `never`, or `json`: for a program, on standard error.
    """
    if choice == "json":
        yield ProgressMeter(lambda line: _write(f"{line}\n", gdb.STDERR), as_json=True)
        return
    if not _somebody_watches(choice):
        yield ProgressMeter(None)
        return
    line = OneLine(_write)
    try:
        yield ProgressMeter(line.show)
    finally:
        line.clear()


def _write(text: str, stream: int = gdb.STDOUT) -> None:
    gdb.write(text, stream)
    gdb.flush(stream)


def _somebody_watches(choice: str) -> bool:
    """Tell whether progress is to be shown: `auto`, `always` or `never`."""
    return os.isatty(1) if choice == "auto" else choice == "always"
