"""SH-4: little-endian."""

from __future__ import annotations

from qemu_dump_ext.architectures._sh4 import make_sh4

ARCHITECTURE = make_sh4("sh4", "little")
