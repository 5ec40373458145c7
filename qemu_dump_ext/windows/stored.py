"""What an earlier dump of Windows says of the guest."""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.architectures import Architecture
from qemu_dump_ext.guest.memory import GuestMemory
from qemu_dump_ext.guest.model import RamBlock, Vcpu
from qemu_dump_ext.structures.dialect import MENDED
from qemu_dump_ext.structures.win_dmp import VALID_DUMP, WindowsDump
from qemu_dump_ext.windows.dump_header import (
    CONTEXT_SIZES,
    DumpHeader,
    context_places,
    decode_context,
)
from qemu_dump_ext.windows.system_memory import WindowsGuest

_CR0_PG, _CR4_PAE, _EFER_LONG_MODE = 1 << 31, 1 << 5, 0x500
_VCPUS_MAX = 1 << 12


def dump_of_header(header: bytes) -> WindowsDump:
    """Return the dump that a header describes, whose memory is as it is.

    Raises:
        RequestError: It lists more physical memory runs than it has room for.
    """
    made = _header(header)
    return WindowsDump(made.word_size, header, tuple(made.runs(MENDED)))


def vcpus_of_header(
    header: bytes,
    architecture: Architecture,
    memory: GuestMemory,
    ram_blocks: Sequence[RamBlock],
) -> Sequence[Vcpu]:
    """Return the registers that were saved in memory; without those that translate addresses.

    Args:
        header: Of the dump.
        architecture: Of the guest.
        memory: In the dump.
        ram_blocks: Where that is.

    Raises:
        RequestError: The header does not lead to them.
        SourceError: Memory cannot be read.
    """
    made = _header(header)
    word = made.word_size
    is_pae = word == 8 or made["PaeEnabled"]
    mode = {
        "cr0": _CR0_PG,
        "cr4": _CR4_PAE if is_pae else 0,
        "efer": _EFER_LONG_MODE if word == 8 else 0,
    }
    guest = WindowsGuest(architecture, [Vcpu(0, mode)], memory, ram_blocks)
    system = guest.system_memory(made["DirectoryTableBase"])
    count = min(made["NumberProcessors"], _VCPUS_MAX)
    saved = (
        system.read(place, CONTEXT_SIZES[word]) for place in context_places(made, system, count)
    )
    return [
        Vcpu(number, {} if data is None else decode_context(data, word))
        for number, data in enumerate(saved)
    ]


def with_mode(vcpus: Sequence[Vcpu], *, long: bool) -> Sequence[Vcpu]:
    """Return vCPUs with the register that tells of long mode, where it is not known."""
    mode = {"efer": _EFER_LONG_MODE if long else 0}
    return [Vcpu(vcpu.index, {**mode, **vcpu.registers}) for vcpu in vcpus]


def _header(header: bytes) -> DumpHeader:
    word_size = next(size for size, word in VALID_DUMP.items() if word == header[4:8])
    return DumpHeader(word_size, bytearray(header))
