"""32-bit RISC-V.

Sources: see _riscv.py.
"""

from __future__ import annotations

from qemu_dump_ext.architectures._riscv import make_architecture

ARCHITECTURE = make_architecture(4)
