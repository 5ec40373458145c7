"""A processor that has two registers."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.architectures import Architecture, Core, NoteLayout, Register
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import StructLayout, fields_of
from qemu_dump_ext.structures.dialect import Dialect

_NOTE = NoteLayout("TOY", 1, StructLayout("toy_regs", fields_of("u32", "pr_pid acc pc")), 4)
_CORE = Core(0x7077, "big", 4, (_NOTE,), "toy")


def _select_core(
    _vcpus: Sequence[Vcpu], _blocks: Sequence[RamBlock], _dialect: Dialect, _machine: str
) -> Core:
    return _CORE


ARCHITECTURE = Architecture(
    name="toy",
    cpu_type_suffix="-toy-cpu",
    qemu_uname_machine="Unknown",
    registers=(Register("acc", monitor=("ACC",)), Register("pc", monitor=("PC",))),
    cores=(_CORE,),
    program_counter="pc",
    page_size=4096,
    phys_base_key=None,
    select_core=_select_core,
    dumped_by_qemu_since=None,
)
