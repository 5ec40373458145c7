"""What one file of `cli/subcommands/` and of `cli/collector/` must declare."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Subcommand:
    """One word behind a program of several.

    Attributes:
        name: The name of the file: the word, with `_` for `-`.
        help: One line.
        add_arguments: Declares the options on the parser of this subcommand.
        run: Does the work and returns the exit status; `DumpError` becomes one line on stderr.
        spell_out: Returns the words behind the subcommand as argparse wants them.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    spell_out: Callable[[Sequence[str]], Sequence[str]] = tuple
