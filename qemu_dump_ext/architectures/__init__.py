"""One file for each QEMU target."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache

from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Core,
    FrameRecord,
    MachineRam,
    MigratedCpu,
    NoteLayout,
    Register,
    TargetClues,
    VcpuReadings,
    phys_base,
)
from qemu_dump_ext.architectures._page_tables import (
    ALWAYS_LEAF,
    AddressWindow,
    PageTableGeometry,
    PageTableRoot,
    TableLevel,
    Translation,
    passes,
)
from qemu_dump_ext.architectures._register_text import parse_named_values
from qemu_dump_ext.discovery import collect
from qemu_dump_ext.errors import UnsupportedTargetError

__all__ = [
    "ALWAYS_LEAF",
    "AddressWindow",
    "Architecture",
    "Core",
    "FrameRecord",
    "MachineRam",
    "MigratedCpu",
    "NoteLayout",
    "PageTableGeometry",
    "PageTableRoot",
    "Register",
    "TableLevel",
    "TargetClues",
    "Translation",
    "VcpuReadings",
    "all_architectures",
    "architecture_for_cpu_types",
    "architectures_of_target",
    "parse_named_values",
    "passes",
    "phys_base",
]

_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")


@cache
def all_architectures() -> dict[str, Architecture]:
    """Return every architecture by name."""
    return collect(sys.modules[__name__], "ARCHITECTURE", Architecture)


@cache
def architectures_of_target(target: str | None) -> Mapping[str, Architecture]:
    """Return what a guest may be, by name: the fewer, the sooner they are imported.

    Args:
        target: QEMU's name of the target; None: not known.
    """
    if target is None or not _NAME.fullmatch(target):
        return all_architectures()
    try:
        module = importlib.import_module(f"{__name__}.{target}")
    except ImportError:
        return all_architectures()
    architecture: Architecture = module.ARCHITECTURE
    return {target: architecture} if architecture.recognize is None else all_architectures()


def architecture_for_cpu_types(
    cpu_types: Iterable[str],
    clues: TargetClues | None = None,
    target: str | None = None,
) -> Architecture:
    """Find the architecture of a guest by the QOM types of its CPUs.

    Args:
        cpu_types: The CPU types, such as `cortex-a57-arm-cpu`.
        clues: What else is known, for types that several architectures share.
        target: QEMU's name of the target; None: not known.

    Raises:
        UnsupportedTargetError: None is known.
    """
    types = sorted(cpu_types)
    passed_over = []
    for architecture in architectures_of_target(target).values():
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
