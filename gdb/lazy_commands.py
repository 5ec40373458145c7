"""Commands of which gdb knows name and help; the rest is imported when one is used.

`source PATH/qemu_dump.py` stands in ~/.gdbinit, and most sessions never use a command of ours.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gdb

_UNEXPECTED = 1
_ENDING = "_command"


class _LazyCommand(gdb.Command):
    def __init__(self, name: str, text: str, module: str, root: Path) -> None:
        self.__doc__ = text  # which gdb takes for its help, and the first line for `apropos`
        self._module = module
        self._root = root
        super().__init__(name, gdb.COMMAND_DATA)

    def invoke(self, argument: str, from_tty: bool) -> None:
        self.dont_repeat()
        # What an error leaves that nobody expects.
        gdb.set_convenience_variable("_qemu_dump_status", _UNEXPECTED)
        self._imported().invoke(argument)

    def complete(self, text: str, word: str | None) -> Sequence[str]:
        found: Sequence[str] = self._imported().complete(text, word)
        return found

    def _imported(self) -> Any:
        _add_environments(self._root)
        return importlib.import_module(self._module).COMMAND


@cache
def _add_environments(root: Path) -> None:
    """Let packages of others be found where this one was installed."""
    active = os.environ.get("VIRTUAL_ENV")
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own, foreign = [], []
    for environment in (root / ".venv", *([Path(active)] if active else [])):
        directory = environment / "lib" / python / "site-packages"
        if directory.is_dir():
            own.append(str(environment))
            if str(directory) not in sys.path:
                sys.path.append(str(directory))
        elif environment.is_dir():
            foreign.append(str(environment))
    third_party = importlib.import_module("qemu_dump_ext.third_party")
    third_party.foreign_environments[:] = foreign
    third_party.own_environments[:] = own


def register(directory: Path, root: Path) -> None:
    """Make a command of each file `NAME_command.py`; its help is `help/qemu-NAME.txt`.

    Args:
        directory: Where the files are.
        root: Where the package is.
    """
    for script in sorted(directory.glob(f"*{_ENDING}.py")):
        name = "qemu-" + script.stem.removesuffix(_ENDING).replace("_", "-")
        text = (directory / "help" / f"{name}.txt").read_text("utf-8")
        _LazyCommand(name, text, script.stem, root)
