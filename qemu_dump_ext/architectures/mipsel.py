"""MIPS: 32-bit, little-endian."""

from __future__ import annotations

from qemu_dump_ext.architectures._mips import make_architecture

ARCHITECTURE = make_architecture("mipsel", word_size=4, byte_order="little")
