"""Xtensa: little-endian."""

from __future__ import annotations

from qemu_dump_ext.architectures._xtensa import make_xtensa

ARCHITECTURE = make_xtensa("xtensa", "little")
