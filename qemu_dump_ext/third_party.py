"""Packages of others, which an installation need not have: which they are, and what brings them.

What runs `qemu-dump-guest-memory --qmp` is always installed; everything else comes with an extra
of ours. gdb embeds a Python of its own, which may lack them all.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from qemu_dump_ext.errors import MissingPackageError
from qemu_dump_ext.value import Value


class ThirdPartyPackage(Value):
    """A package of others.

    Attributes:
        name: What `pip install` calls the package.
        extras: Those of ours that bring the package, the one to name first; empty: it is always
            installed.
        needs: What must be there before `pip install` can work; empty: nothing.
    """

    name: str
    extras: tuple[str, ...]
    needs: str = ""


PACKAGES: Mapping[str, ThirdPartyPackage] = {
    "drgn": ThirdPartyPackage("drgn", ("drgn",)),
    "fsspec": ThirdPartyPackage("fsspec", ("upload",)),
    "lzo": ThirdPartyPackage("python-lzo", ("lzo",), needs="liblzo2-dev and a C compiler"),
    "numpy": ThirdPartyPackage("numpy", ("fast",)),
    "prometheus_client": ThirdPartyPackage("prometheus_client", ("collector",)),
    "prompt_toolkit": ThirdPartyPackage("prompt_toolkit", ("proxy",)),
    "pydantic": ThirdPartyPackage("pydantic", ("collector",)),
    "pygdbmi": ThirdPartyPackage("pygdbmi", ("gdb",)),
    "qemu.qmp": ThirdPartyPackage("qemu.qmp", ()),
    "snappy": ThirdPartyPackage("python-snappy", ("fast",)),
    "yaml": ThirdPartyPackage("pyyaml", ("images", "collector")),
    "zstandard": ThirdPartyPackage("zstandard", ("fast", "images")),
}
"""By the module that is imported. What stands here is asked for by name when it is missing."""

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


def import_package(module: str, purpose: str) -> ModuleType:
    """Import a module of `PACKAGES` when it is needed.

    Args:
        module: Name of the module.
        purpose: What needs it, for the message.

    Raises:
        MissingPackageError: It cannot be imported; says which command brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing_package(module, purpose) from error


def require_extra(extra: str, purpose: str) -> None:
    """Look whether the packages of an extra of ours are installed; they are not imported.

    Raises:
        MissingPackageError: One is missing.
    """
    for module, package in PACKAGES.items():
        if extra in package.extras and importlib.util.find_spec(module) is None:
            raise _missing_package(module, purpose, extra)


def _missing_package(module: str, purpose: str, extra: str | None = None) -> MissingPackageError:
    # A module that is not in the table is of a package of its name.
    package = PACKAGES.get(module, ThirdPartyPackage(module, ()))
    extra = extra or next(iter(package.extras), None)
    message, hint = _describe(
        purpose,
        package,
        f"'qemu_dump_ext[{extra}]'" if extra else package.name,
        inside_gdb="gdb" in sys.modules,
        python=sys.executable,
        version="{}.{}".format(*sys.version_info),
        foreign=foreign_environments,
    )
    return MissingPackageError(message, package=package.name, hint=hint)


def _describe(
    purpose: str,
    package: ThirdPartyPackage,
    wanted: str,
    *,
    inside_gdb: bool,
    python: str,
    version: str,
    foreign: Sequence[str],
) -> tuple[str, str]:
    message = f"{purpose} needs the Python package {package.name}"
    after = f", after {package.needs}" if package.needs else ""
    if not inside_gdb:
        return (
            f"{message}, which Python {version} lacks",
            f"{python} -m pip install {wanted}{after}",
        )
    message += f", which gdb's own Python {version} lacks"
    if foreign:
        message += f": {', '.join(foreign)} is for another version"
    hint = (
        f"python{version} -m venv DIR, DIR/bin/pip install {package.name}{after}, and start gdb"
        " with VIRTUAL_ENV=DIR; or dump without gdb: qemu-dump-guest-memory --qmp SOCKET"
    )
    return message, hint
