"""MicroBlaze: big-endian."""

from __future__ import annotations

from qemu_dump_ext.architectures._microblaze import make_microblaze

ARCHITECTURE = make_microblaze("microblaze", "big")
