"""MIPS: 64-bit, big-endian."""

from __future__ import annotations

from qemu_dump_ext.architectures._mips import make_architecture

ARCHITECTURE = make_architecture("mips64", word_size=8, byte_order="big")
