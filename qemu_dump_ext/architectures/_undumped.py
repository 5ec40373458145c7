"""What targets have in common that QEMU itself cannot dump: their notes are those of Linux.

Some come in two byte orders, which share names of CPUs, registers, and monitor output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qemu_dump_ext.architectures._declaration import (
    Architecture,
    Core,
    Register,
    TargetClues,
    VcpuReadings,
)
from qemu_dump_ext.architectures._linux_notes import wide_fields
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.c_struct import Abi, ByteOrder, StructLayout
from qemu_dump_ext.structures.dialect import Dialect

_BYTE_ORDERS: tuple[ByteOrder, ByteOrder] = ("little", "big")


def g_packet(*groups: tuple[int, str]) -> StructLayout:
    """Declare the `g` packet: groups of registers, each the size of its members and their names."""
    return StructLayout(
        "g packet",
        tuple(field for size, names in groups for field in wide_fields(names, size, "bytes")),
    )


def make_architecture(
    name: str,
    core: Core,
    registers: tuple[Register, ...],
    program_counter: str,
    *,
    cpu_type_suffix: str,
    gdb_settings: tuple[str, ...],
    page_size: int = 4096,
    g_packet: StructLayout | None = None,
    parse_monitor: Callable[[str], Mapping[str, int]] | None = None,
    reconcile: Callable[[VcpuReadings], Mapping[str, int]] | None = None,
    recognize: Callable[[TargetClues], bool] | None = None,
) -> Architecture:
    """Declare a target that has one core; the arguments are the attributes of Architecture."""

    def select_core(
        _vcpus: Sequence[Vcpu], _blocks: Sequence[RamBlock], _dialect: Dialect, _machine: str
    ) -> Core:
        return core

    return Architecture(
        name=name,
        cpu_type_suffix=cpu_type_suffix,
        qemu_uname_machine="Unknown",
        registers=registers,
        cores=(core,),
        program_counter=program_counter,
        page_size=page_size,
        phys_base_key=None,
        select_core=select_core,
        parse_monitor=parse_monitor,
        reconcile=reconcile,
        recognize=recognize,
        g_packet=g_packet,
        gdb_settings=gdb_settings,
        dumped_by_qemu_since=None,
    )


def recognize_by_byte_order(
    name: str,
    byte_order: ByteOrder,
    layout: StructLayout,
    parse_monitor: Callable[[str], Mapping[str, int]],
) -> Callable[[TargetClues], bool]:
    """Return the function that tells two targets apart which differ in nothing but byte order.

    QEMU's name of the target decides; without, guest memory that the monitor shows as words and
    as bytes, or the registers that the monitor shows as numbers and the stub sends as bytes.

    Args:
        name: The name of the target.
        byte_order: The byte order of the target.
        layout: How the `g` packet begins, with our names of registers.
        parse_monitor: The architecture's parser of the monitor's text.
    """

    def recognize(clues: TargetClues) -> bool:
        target = clues.target_name()
        if target is not None:
            return target == name
        found = clues.memory_byte_order() or _byte_order(
            clues.g_packet(), layout, parse_monitor(clues.register_text)
        )
        return found == byte_order

    return recognize


def _byte_order(data: bytes, layout: StructLayout, numbers: Mapping[str, int]) -> ByteOrder | None:
    offsets = layout.bind(Abi("little", word_size=4, max_align=1)).offsets
    for field in layout.fields:
        value = data[offsets[field.name] :][: field.count]
        fitting = [
            order
            for order in _BYTE_ORDERS
            if int.from_bytes(value, order) == numbers.get(field.name) and len(value) == field.count
        ]
        if len(fitting) == 1:
            return fitting[0]
    return None
