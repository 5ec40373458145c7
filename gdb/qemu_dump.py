"""Load the commands of qemu_dump_ext into gdb: `source PATH/qemu_dump.py`.

gdb embeds a Python of its own, which need not see the packages that were installed for another
one. The package itself is found beside this file; third-party packages are looked for in the
environment into which it was installed, and what cannot be imported is said when it is needed.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import gdb

_MINIMUM_PYTHON = (3, 11)


def _package_root(here: Path) -> Path:
    for parent in here.parents:
        if (parent / "qemu_dump_ext" / "__init__.py").is_file():
            return parent
    raise gdb.GdbError(f"the package qemu_dump_ext is not beside {here}")


def _load() -> None:
    if sys.version_info < _MINIMUM_PYTHON:
        running = ".".join(str(part) for part in sys.version_info[:3])
        raise gdb.GdbError(
            f"qemu_dump_ext needs a gdb with Python 3.11 or newer; this one has {running}"
            " (qemu-dump-guest-memory --qmp SOCKET works without gdb)"
        )
    here = Path(__file__).resolve()
    root = _package_root(here)
    for directory in (here.parent, root):
        if str(directory) not in sys.path:
            sys.path.insert(0, str(directory))
    importlib.import_module("lazy_commands").register(here.parent, root)


_load()
