"""A guest that libvirt runs: when it panics, libvirt does something with it, too.

Source: libvirt's formatdomain, "Events configuration"; src/qemu/qemu_command.c (charmonitor);
src/qemu/qemu_driver.c (processGuestPanicEvent).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from qemu_dump_ext.value import Value

_MONITOR = re.compile(r"(?:^|,)chardev=charmonitor(?:,|$)")
_NAME = re.compile(r"(?:^|,)guest=(?P<name>(?:[^,]|,,)+)")
_ON_CRASH = re.compile(r"<on_crash>\s*([a-z-]{1,40})\s*</on_crash>")
_XML_MAX = 16 << 20
_DIRECTORIES = (Path("/run/libvirt/qemu"), Path("/etc/libvirt/qemu"))
_ACTION: Mapping[str, str | None] = {
    "destroy": "ends it",
    "restart": "resets it",
    "rename-restart": "resets it",
    "coredump-destroy": "dumps it by itself and ends it",
    "coredump-restart": "dumps it by itself and resets it",
    "preserve": None,
}


class Domain(Value):
    """What libvirt calls a guest.

    Attributes:
        name: The name of the domain.
        on_crash: What it does when the guest panics, by the word of the domain's XML; None: that
            cannot be read.
    """

    name: str
    on_crash: str | None

    @property
    def remark(self) -> str:
        """Say what happens when the guest panics, and what would be better."""
        if self.on_crash is None:
            return (
                "libvirt runs it, and what that does on a panic cannot be read: a dump needs"
                " <on_crash>preserve</on_crash>"
            )
        action = _ACTION.get(self.on_crash, "does what is not known here")
        if action is None:
            return "a panic pauses it, and libvirt leaves it so (on_crash is preserve)"
        return (
            f"libvirt {action} at once when it panics (on_crash is {self.on_crash}), most likely"
            " before it is dumped: let it have <on_crash>preserve</on_crash>"
        )

    @property
    def leaves_it(self) -> bool:
        """Tell whether libvirt leaves a guest that panicked as it is."""
        return self.on_crash == "preserve"


def domain_of(
    command_line: tuple[str, ...], directories: Iterable[Path] | None = None
) -> Domain | None:
    """Return what libvirt calls the guest of a QEMU, or None: libvirt did not start it.

    Args:
        command_line: The command line of QEMU.
        directories: Where the XML of domains is; default: of the system, and of this user.
    """
    pairs = list(pairwise(command_line))
    if not any(option == "-mon" and _MONITOR.search(value) for option, value in pairs):
        return None
    found = (_NAME.search(value) for option, value in pairs if option == "-name")
    name = next((match["name"].replace(",,", ",") for match in found if match), "")
    where = _default_directories() if directories is None else directories
    return Domain(name, _on_crash(name, where))


def _default_directories() -> Iterable[Path]:
    return (*_DIRECTORIES, Path(f"/run/user/{os.getuid()}/libvirt/qemu/run"))


def _on_crash(name: str, directories: Iterable[Path]) -> str | None:
    if not name or "/" in name:
        return None
    for directory in directories:
        try:
            with (directory / f"{name}.xml").open("rb") as file:
                text = file.read(_XML_MAX).decode("utf-8", "replace")
        except OSError:
            continue
        match = _ON_CRASH.search(text)
        return match[1] if match else "destroy"  # libvirt's own default
    return None
