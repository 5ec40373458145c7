"""One file for each QEMU target."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache

from qemu_dump_ext.architectures._declaration import Architecture, TargetClues
from qemu_dump_ext.discovery import collect
from qemu_dump_ext.errors import UnsupportedTargetError


@cache
def all_architectures() -> dict[str, Architecture]:
    """Return every architecture by name."""
    return collect(sys.modules[__name__], "ARCHITECTURE", Architecture)


def architecture_for_cpu_types(
    cpu_types: Iterable[str], clues: TargetClues | None = None
) -> Architecture:
    """Find the architecture of a guest by the QOM types of its CPUs.

    Args:
        cpu_types: Such as `cortex-a57-arm-cpu`.
        clues: What else is known, for types that several architectures share.

    Raises:
        UnsupportedTargetError: None is known.
    """
    types = sorted(cpu_types)
    passed_over = []
    for architecture in all_architectures().values():
        if any(kind.endswith(architecture.cpu_type_suffix) for kind in types):
            if architecture.recognize is None or clues is None or architecture.recognize(clues):
                return architecture
            passed_over.append(architecture.name)
    if passed_over:
        raise UnsupportedTargetError(
            f"the registers do not tell which target this is: {' or '.join(passed_over)}",
            hint="QMP tells, or the stub, or guest memory that is not all zero: add --qmp SOCKET",
        )
    raise UnsupportedTargetError(
        f"guests with CPUs of type {', '.join(types) or 'unknown'} cannot be dumped",
        hint="known architectures: " + ", ".join(all_architectures()),
    )
