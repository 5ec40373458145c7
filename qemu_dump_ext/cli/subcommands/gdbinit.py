"""`qemu-dump gdbinit`: the line that loads our commands into every gdb."""

from __future__ import annotations

import argparse

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.gdb_driver import gdb_script_path
from qemu_dump_ext.errors import EXIT_SUCCESS


def _add_arguments(_parser: argparse.ArgumentParser) -> None:
    pass


def _run(_arguments: argparse.Namespace) -> int:
    print(f"source {gdb_script_path()}")
    return EXIT_SUCCESS


COMMAND = Subcommand(
    "gdbinit", "print the line for ~/.gdbinit", _add_arguments, _run, examples=(">> ~/.gdbinit",)
)
