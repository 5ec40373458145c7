"""32-bit PowerPC.

Sources: see _powerpc.py.
"""

from __future__ import annotations

from qemu_dump_ext.architectures import _powerpc
from qemu_dump_ext.architectures._declaration import Architecture
from qemu_dump_ext.elf_structs import EM_PPC

_CORES = _powerpc.make_cores(EM_PPC, 4, {"big": "ppc", "little": "ppcle"})

ARCHITECTURE = Architecture(
    name="ppc",
    cpu_type_suffix="-powerpc-cpu",
    qemu_uname_machine="Unknown",
    registers=_powerpc.REGISTERS,
    cores=tuple(_CORES.values()),
    program_counter="nip",
    page_size=4096,
    phys_base_key=None,
    kernel_map_base=0xC0000000,
    select_core=_powerpc.select_by(_CORES),
    parse_monitor=_powerpc.parse_monitor,
    reconcile=_powerpc.reconcile,
    stub_byte_order=_powerpc.stub_byte_order,
)
