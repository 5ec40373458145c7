"""64-bit RISC-V.

Sources: see _riscv.py and _riscv_tables.py.
"""

from __future__ import annotations

from dataclasses import replace

from qemu_dump_ext.architectures._riscv import make_architecture
from qemu_dump_ext.architectures._riscv_tables import linux_tables

ARCHITECTURE = replace(make_architecture(8), kernel_page_tables=linux_tables)
