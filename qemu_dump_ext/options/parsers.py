"""Parsers of command lines that say what is wrong in one line."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from qemu_dump_ext import __version__
from qemu_dump_ext.errors import RequestError

STATUSES = (
    "0 done; 1 not as it should be; 2 impossible request; 3 the guest cannot be reached;"
    " 4 cannot be written; 5 a dump or a record is damaged; 130 interrupted"
)

_WIDTH = 78


class PlainParser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of printing its usage; its epilog stays as it is."""

    def __init__(
        self,
        *,
        prog: str,
        description: str | None = None,
        epilog: str | None = None,
        add_help: bool = True,
    ) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            add_help=add_help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise RequestError with argparse's message."""
        raise RequestError(message, hint=f"'{self.prog} --help' shows the options")


class OneLineParser(PlainParser):
    """The same for a whole program, which knows `--version`."""

    def __init__(
        self, *, prog: str, description: str | None = None, epilog: str | None = None
    ) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog)
        self.add_argument(
            "--version",
            action="version",
            version=f"%(prog)s {__version__}",
            help="show the version and exit",
        )


def epilog_of(program: str, examples: Sequence[str], statuses: str = STATUSES) -> str:
    """Return what stands at the end of a help: the exit statuses, and examples.

    Args:
        program: What each example begins with.
        examples: The words behind it.
        statuses: What each status says.
    """
    lines = [f"  {program} {words}".rstrip() for words in examples]
    told = textwrap.fill(f"exit status: {statuses}", _WIDTH)
    return "\n".join((told, "", "examples:", *lines))
