"""QEMU's own notes, from a dump of a single byte that QEMU writes in a millisecond.

They have what no other interface shows: the hidden bits of segment caches, registers of a vCPU in
32-bit code in full width, and the note that the guest gave to the vmcoreinfo device.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qemu_dump_ext.architectures._declaration import Architecture
from qemu_dump_ext.c_struct import ByteOrder
from qemu_dump_ext.elf_structs import EHDR, ELFCLASS64, ELFDATA, elf_abi, phdr_layout
from qemu_dump_ext.errors import MonitorAnswerError, SourceError
from qemu_dump_ext.guest import Monitor
from qemu_dump_ext.notes import decode_vcpu_registers, parse_notes
from qemu_dump_ext.shared_directory import quote_for_monitor, shared_directory


@dataclass(frozen=True)
class NativeNotes:
    """What such a dump tells.

    Attributes:
        vcpus: Registers by name, by ascending cpu_index.
        guest_note: The guest's note, header included; empty where there is none.
        byte_order: Of that dump; None where there is none.
    """

    vcpus: Sequence[Mapping[str, int]]
    guest_note: bytes
    byte_order: ByteOrder | None = None


def dump_byte_through_file(monitor: Monitor, gpa: int) -> bytes:
    """Let QEMU dump one byte at `gpa` into a file that both sides can open.

    Returns:
        The ELF file.

    Raises:
        SourceError: QEMU refuses, or the file does not appear here.
    """
    with shared_directory() as directory:
        path = directory / "notes"
        # Ours, so that QEMU's mode 0400 does not matter, and so that we notice when QEMU writes
        # another file of this name.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        command = f"dump-guest-memory {quote_for_monitor(path)} {gpa:#x} 1"
        answer = monitor.execute(command)
        if "Error:" in answer:
            raise MonitorAnswerError(command, answer)
        content = path.read_bytes()
    if not content:
        raise SourceError("QEMU's file does not appear here: QEMU is elsewhere")
    return content


def parse_native_notes(content: bytes, architecture: Architecture, vcpu_count: int) -> NativeNotes:
    """Take the notes of QEMU's own ELF dump apart.

    Raises:
        SourceError: It is no dump of this architecture.
    """
    word_size = 8 if content[4:5] == bytes((ELFCLASS64,)) else 4
    byte_order: ByteOrder = "big" if content[5:6] == bytes((ELFDATA["big"],)) else "little"
    abi = elf_abi(byte_order, word_size)
    ehdr, phdr = EHDR.bind(abi), phdr_layout(word_size).bind(abi)
    if len(content) < ehdr.size:
        raise SourceError("QEMU's dump of one byte is cut")
    header = ehdr.unpack_integers(content)
    if len(content) < header["e_phoff"] + phdr.size:
        raise SourceError("QEMU's dump of one byte is cut")
    segment = phdr.unpack_integers(content, header["e_phoff"])  # PT_NOTE is the first
    area = content[segment["p_offset"] :][: segment["p_filesz"]]
    notes = list(parse_notes(area, byte_order))
    for core in architecture.cores:
        if (core.e_machine, core.byte_order) != (header["e_machine"], byte_order):
            continue
        decoded = decode_vcpu_registers(architecture, core, notes, vcpu_count)
        if decoded is not None:
            guest_notes = notes[decoded.count :]
            start = guest_notes[0].offset if guest_notes else len(area)
            return NativeNotes(decoded.vcpus, area[start:], byte_order)
    raise SourceError("QEMU's dump of one byte has notes of another kind")
