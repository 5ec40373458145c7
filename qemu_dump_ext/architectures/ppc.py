"""32-bit PowerPC."""

from __future__ import annotations

from qemu_dump_ext.architectures._powerpc import make_architecture
from qemu_dump_ext.structures.elf import EM_PPC

ARCHITECTURE = make_architecture("ppc", EM_PPC, 4, cpu_type_suffix="-powerpc-cpu")
