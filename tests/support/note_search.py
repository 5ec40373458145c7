"""The search for VMCOREINFO through the memory of a guest that is stopped."""

from __future__ import annotations

import pytest

from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.guest_images.machine import QemuMachine
from qemu_dump_ext.linux import vmcoreinfo_search
from qemu_dump_ext.linux.vmcoreinfo_search import KernelNote, NoteSearch
from qemu_dump_ext.memory_sources import open_memory
from qemu_dump_ext.qemu.probe import probe_guest
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.structures.dialect import MENDED


def search_for_note(machine: QemuMachine) -> tuple[KernelNote | None, int]:
    """Search as for the first time, by QMP; return what is found, and how many bytes it took."""
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch, connect_qmp(str(machine.qmp_sockets[0])) as qmp:
        patch.setattr(vmcoreinfo_search, "_RECENT", [])
        access = GuestAccess.by_qmp(qmp)
        guest = probe_guest(access)
        core = guest.architecture.select_core(guest.vcpus, guest.ram_blocks, MENDED, guest.machine)
        with open_memory("process", access.source_context(guest.ram_blocks, None)) as opened:
            search = NoteSearch(
                guest.architecture,
                core.byte_order,
                opened.memory,
                guest.ram_blocks,
                guest.vcpus,
                advance=sizes.append,
            )
            return search.find().chosen, sum(sizes)
