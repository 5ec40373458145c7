"""64-bit PowerPC in both byte orders; also a 32-bit processor in qemu-system-ppc64.

Sources: see _powerpc.py and _powerpc_tables.py.
"""

from __future__ import annotations

from qemu_dump_ext.architectures import _powerpc
from qemu_dump_ext.architectures._declaration import Architecture
from qemu_dump_ext.architectures._powerpc_tables import linux_translations
from qemu_dump_ext.elf_structs import EM_PPC64

_CORES = _powerpc.make_cores(EM_PPC64, 8, {"big": "ppc64", "little": "ppc64le"})

ARCHITECTURE = Architecture(
    name="ppc64",
    cpu_type_suffix="-powerpc64-cpu",
    qemu_uname_machine="Unknown",
    registers=_powerpc.REGISTERS,
    cores=tuple(_CORES.values()),
    program_counter="nip",
    page_size=4096,
    phys_base_key=None,
    kernel_map_base=0xC000000000000000,
    select_core=_powerpc.select_by(_CORES),
    parse_monitor=_powerpc.parse_monitor,
    reconcile=_powerpc.reconcile,
    machine_page_sizes={"pseries": 65536},
    stub_byte_order=_powerpc.stub_byte_order,
    kernel_page_tables=linux_translations,
)
