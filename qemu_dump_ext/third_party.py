"""What to say where a third-party package cannot be imported: gdb embeds a Python of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

foreign_environments: list[str] = []
"""Where the packages may well be, but for another version of Python; set by what loads us."""
own_environments: list[str] = []
"""Where the packages are that were added to those of this Python; set by what loads us."""


def interpreter() -> str | None:
    """Return a Python like this one for a process of our own, or None where none is found.

    Inside gdb, this one is gdb, whose sys.executable need not exist.
    """
    version = "python{}.{}".format(*sys.version_info)
    programs = [f"{environment}/bin/python" for environment in own_environments]
    programs += [sys.executable, f"{sys.base_prefix}/bin/{version}"]
    return next((program for program in programs if os.access(program, os.X_OK)), None)


def missing_package(purpose: str, package: str, needs: str = "") -> tuple[str, str]:
    """Return message and hint for a package that this interpreter cannot import.

    Args:
        purpose: What needs it.
        package: What `pip install` calls it.
        needs: What must be there before `pip install` can work.
    """
    return _describe(
        purpose,
        package,
        needs,
        inside_gdb="gdb" in sys.modules,
        version="{}.{}".format(*sys.version_info),
        foreign=foreign_environments,
    )


def _describe(
    purpose: str,
    package: str,
    needs: str,
    *,
    inside_gdb: bool,
    version: str,
    foreign: Sequence[str],
) -> tuple[str, str]:
    message = f"{purpose} needs the Python package {package}"
    after = f", after {needs}" if needs else ""
    if not inside_gdb:
        return f"{message}, which Python {version} lacks", f"pip install {package}{after}"
    message += f", which gdb's own Python {version} lacks"
    if foreign:
        message += f": {', '.join(foreign)} is for another version"
    hint = (
        f"python{version} -m venv DIR, DIR/bin/pip install {package}{after}, and start gdb with"
        " VIRTUAL_ENV=DIR; or dump without gdb: qemu-dump-guest-memory --qmp SOCKET"
    )
    return message, hint
