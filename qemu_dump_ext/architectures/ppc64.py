"""64-bit PowerPC in both byte orders; also a 32-bit processor in qemu-system-ppc64."""

from __future__ import annotations

from dataclasses import replace

from qemu_dump_ext.architectures._declaration import MachineRam
from qemu_dump_ext.architectures._powerpc import make_architecture
from qemu_dump_ext.architectures._powerpc_tables import linux_translations
from qemu_dump_ext.structures.elf import EM_PPC64

ARCHITECTURE = replace(
    make_architecture(
        "ppc64",
        EM_PPC64,
        8,
        cpu_type_suffix="-powerpc64-cpu",
        machine_page_sizes={"pseries": 65536},
    ),
    machines=(MachineRam("pseries-", ((0, 0, None),)),),
    kernel_page_tables=linux_translations,
)
