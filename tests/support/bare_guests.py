"""Guests of a few instructions, which show whether a dump of them is of one moment.

Every vCPU of a counting guest draws the next number of a counter that all share, stores it in the
next one of its pages, counts that in a register, and so on without end. At any moment, the numbers
in the pages of a vCPU ascend in the order in which they were stored, and the vCPUs together have
drawn as many as the counter says.

A guest that stands idle has set some registers and one word of memory, and halts without
interrupts: nothing in it changes any more.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_PAGE = 4096
PAGES = 512
"""Of each vCPU of a counting guest."""

# Entered in real mode; then flat 32-bit mode. As GNU as has it:
#   entry: cli; lgdtl %cs:gdt_ptr; movl %cr0,%eax; orb $1,%al; movl %eax,%cr0; ljmpl $8,$pm
#   pm: movw $16,%ax; movw %ax,%ds; movw %ax,%es; movw %ax,%ss
#       movl $0x1b,%ecx; rdmsr; testb $1,%ah; jz worker                # only the first vCPU:
#       movl $0x000C4500,0xfee00300; movl $1000,%ecx; 1: loop 1b       # reset the others
#       movl $0x000C46F0,0xfee00300                                    # start them at 0xF0000
#   worker: movl $0x01000000,%esi; movl 0xfee00020,%edi; shrl $24,%edi; shll $21,%edi
#       addl $0x02000000,%edi; xorl %ebp,%ebp
#   2:  movl $1,%eax; lock xaddl %eax,(%esi); movl %ebp,%ebx; andl $0x1ff,%ebx; shll $12,%ebx
#       movl %eax,(%edi,%ebx); incl %ebp; jmp 2b
#   .align 8; gdt: .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
#   gdt_ptr: .word 23; .long gdt
_X86_COUNTING = bytes.fromhex(
    "fa2e660f011698000f20c00c010f22c066ea18000f00080066b810008ed88ec08ed0b91b0000000f32f6c40174"
    "1bc7050003e0fe00450c00b9e8030000e2fec7050003e0fef0460c00be000000018b3d2000e0fec1ef18c1e715"
    "81c70000000231edb801000000f00fc10689eb81e3ff010000c1e30c89041f45ebe68d74260000000000000000"
    "00ffff0000009acf00ffff00000092cf00170080000f00"
)
# The same as far as pm; then
#   movl $0x11223344,%eax; movl $0x55667788,%ebx; movl $0x99aabbcc,%esp; movl $0x0badcafe,%esi
#   movl %eax,0x01234560; 3: hlt; jmp 3b
_X86_IDLE = bytes.fromhex(
    "fa2e660f011658000f20c00c010f22c066ea18000f00080066b810008ed8b844332211bb88776655bcccbbaa99"
    "befecaad0ba360452301f4ebfd8db6000000000000000000000000ffff0000009acf00ffff00000092cf001700"
    "40000f00"
)
_X86_RESET_VECTOR = bytes.fromhex("ea000000f0")  # ljmp $0xf000,$0
_BIOS_SIZE = 1 << 16

_AARCH64_COUNTING = struct.pack(
    "<26I",
    0xD2800029,  # mov x9, #1: start the others, by PSCI
    0xD2800060,  # mov x0, #3
    0xF2B88000,  # movk x0, #0xc400, lsl #16: CPU_ON
    0xAA0903E1,  # mov x1, x9
    0x100000C2,  # adr x2, worker
    0xD2800003,  # mov x3, #0
    0xD4000002,  # hvc #0
    0x91000529,  # add x9, x9, #1
    0xF100113F,  # cmp x9, #4
    0x54FFFF0B,  # b.lt -8 instructions
    0xD2A82000,  # worker: mov x0, #0x41000000
    0xD2A84001,  # mov x1, #0x42000000
    0xD2803FE2,  # mov x2, #0x1ff
    0xD53800A8,  # mrs x8, mpidr_el1
    0x92401D08,  # and x8, x8, #0xff
    0x8B085421,  # add x1, x1, x8, lsl #21
    0xD2800007,  # mov x7, #0
    0xC85F7C03,  # ldxr x3, [x0]
    0x91000464,  # add x4, x3, #1
    0xC8057C04,  # stxr w5, x4, [x0]
    0x35FFFFA5,  # cbnz w5, -3 instructions
    0x8A0200E6,  # and x6, x7, x2
    0x8B063026,  # add x6, x1, x6, lsl #12
    0xF90000C3,  # str x3, [x6]
    0x910004E7,  # add x7, x7, #1
    0x17FFFFF8,  # b -8 instructions
)
_AARCH64_IDLE = struct.pack(
    "<7I",
    0xD2824680,  # mov x0, #0x1234
    0xF2A8ACE0,  # movk x0, #0x4567, lsl #16
    0xD2A82001,  # mov x1, #0x41000000
    0xF9000020,  # str x0, [x1]
    0xD5034FDF,  # msr daifset, #15
    0xD503207F,  # wfi
    0x17FFFFFF,  # b -1 instruction
)
_RISCV64_COUNTING = struct.pack(
    "<17I",
    0x08100293,  # li t0, 0x81
    0x01829293,  # slli t0, t0, 24
    0x08200313,  # li t1, 0x82
    0x01831313,  # slli t1, t1, 24
    0xF1402FF3,  # csrr t6, mhartid
    0x015F9F93,  # slli t6, t6, 21
    0x01F30333,  # add t1, t1, t6
    0x1FF00393,  # li t2, 0x1ff
    0x00100E13,  # li t3, 1
    0x00000413,  # li s0, 0
    0x01C2BEAF,  # amoadd.d t4, t3, (t0)
    0x00747F33,  # and t5, s0, t2
    0x00CF1F13,  # slli t5, t5, 12
    0x006F0F33,  # add t5, t5, t1
    0x01DF3023,  # sd t4, 0(t5)
    0x00140413,  # addi s0, s0, 1
    0xFE9FF06F,  # j -6 instructions
)
_RISCV64_IDLE = struct.pack(
    "<7I",
    0x08100293,  # li t0, 0x81
    0x01829293,  # slli t0, t0, 24
    0x12300313,  # li t1, 0x123
    0x0062B023,  # sd t1, 0(t0)
    0x30401073,  # csrw mie, zero
    0x10500073,  # wfi
    0xFFDFF06F,  # j -1 instruction
)


@dataclass(frozen=True)
class CountingGuest:
    """Where a counting guest has what.

    Attributes:
        counter: gpa of the counter.
        pages: gpa of the first page; those of a vCPU behind those of the one before it.
        word_size: Of a number, in bytes.
        count: Our name of the register that says how many numbers a vCPU has stored.
        program_counter: Ours.
        drawn: First and last address at which a vCPU has a number that it has not counted; at the
            last, it is stored.
        unless: Register that is not zero where it has not really drawn it; empty: it has.
    """

    counter: int
    pages: int
    word_size: int
    count: str
    program_counter: str
    drawn: tuple[int, int]
    unless: str = ""


COUNTING = {
    "x86_64": CountingGuest(0x1000000, 0x2000000, 4, "rbp", "rip", (0xF006B, 0xF0079)),
    "aarch64": CountingGuest(
        0x41000000, 0x42000000, 8, "x7", "pc", (0x40200050, 0x40200060), unless="x5"
    ),
    "riscv64": CountingGuest(0x81000000, 0x82000000, 8, "x8", "pc", (0x8000002C, 0x8000003C)),
}


def counting_arguments(target: str, folder: Path, vcpus: int) -> list[str]:
    """Return the arguments of QEMU for a counting guest; at most 4 vCPUs."""
    programs = (_X86_COUNTING, _AARCH64_COUNTING, _RISCV64_COUNTING)
    return ["-smp", str(vcpus), *_arguments(target, folder, programs)]


def idle_arguments(target: str, folder: Path) -> list[str]:
    """Return the arguments of QEMU for a guest that stands idle."""
    return _arguments(target, folder, (_X86_IDLE, _AARCH64_IDLE, _RISCV64_IDLE))


def _arguments(target: str, folder: Path, programs: tuple[bytes, bytes, bytes]) -> list[str]:
    path = folder / "program"
    program = dict(zip(COUNTING, programs, strict=True))[target]
    if target == "x86_64":
        bios = bytearray(program.ljust(_BIOS_SIZE, b"\0"))
        bios[0xFFF0:0xFFF5] = _X86_RESET_VECTOR
        path.write_bytes(bios)
        return ["-M", "q35", "-m", "64", "-bios", str(path)]
    path.write_bytes(program)
    if target == "riscv64":
        return ["-M", "virt", "-m", "64", "-bios", str(path)]
    loader = f"loader,file={path},addr=0x40200000,cpu-num=0,force-raw=on"
    return ["-M", "virt", "-cpu", "cortex-a57", "-m", "64", "-device", loader]


def torn_pages(
    guest: CountingGuest, memory: bytes, counter: int, vcpus: Sequence[Mapping[str, int]]
) -> list[str]:
    """Return what in a dump of a counting guest is not of one moment.

    Args:
        guest: Where it has what.
        memory: All of its pages.
        counter: Value of the counter: the next number that will be drawn.
        vcpus: Registers of each.
    """
    found = []
    drawn = 0
    for index, registers in enumerate(vcpus):
        place = registers[guest.program_counter]
        under_way = guest.drawn[0] <= place <= guest.drawn[1] and not (
            place == guest.drawn[0] and registers.get(guest.unless, 0)
        )
        count = registers[guest.count]
        drawn += count + under_way
        stored = count + (place == guest.drawn[1])
        values = [
            int.from_bytes(memory[at : at + guest.word_size], "little")
            for turn in range(max(stored - PAGES, 0), stored)
            for at in [(index * PAGES + turn % PAGES) * _PAGE]
        ]
        for before, value in pairwise(values):
            if before >= value:
                found.append(f"vCPU {index}: {value} is stored behind {before}")
        if values and values[-1] >= counter:
            found.append(f"vCPU {index}: {values[-1]} is stored, {counter} was not drawn yet")
    if drawn != counter:
        found.append(f"the vCPUs have drawn {drawn} numbers, the counter says {counter}")
    return found
