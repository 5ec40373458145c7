"""What one file of `cli/subcommands/` and of `cli/collector/` must declare."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import field

from qemu_dump_ext.options.parsers import STATUSES
from qemu_dump_ext.value import Value


class Subcommand(Value):
    """One word behind a program of several.

    Attributes:
        name: The name of the file: the word, with `_` for `-`.
        help: One line.
        add_arguments: Declares the options on the parser of this subcommand.
        run: Does the work and returns the exit status; `DumpError` becomes one line on stderr.
        spell_out: Returns the words behind the subcommand as argparse wants them.
        examples: What people may type, without the name of the program.
        statuses: What the exit status says.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    spell_out: Callable[[Sequence[str]], Sequence[str]] = tuple
    examples: tuple[str, ...] = field(kw_only=True)
    statuses: str = STATUSES


class Program(Value):
    """A whole program that is also a word behind another one.

    Attributes:
        name: As of `Subcommand`.
        help: One line.
        main: Gets the words behind the word, and what it is called; returns the exit status.
    """

    name: str
    help: str
    main: Callable[[Sequence[str], str], int]
