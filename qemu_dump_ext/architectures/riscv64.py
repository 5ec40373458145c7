"""64-bit RISC-V.

Sources: see _riscv.py and _linux_tables.py.
"""

from __future__ import annotations

from dataclasses import replace

from qemu_dump_ext.architectures._linux_tables import riscv64_kernel_tables
from qemu_dump_ext.architectures._riscv import make_architecture

ARCHITECTURE = replace(
    make_architecture(8, kernel_map_base=None), kernel_page_tables=riscv64_kernel_tables
)
