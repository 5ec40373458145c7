from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qemu_dump_ext.structures.c_struct import Abi, Field, StructLayout, fields_of
from qemu_dump_ext.structures.elf import EHDR, NHDR, SHDR, elf_abi, phdr_layout
from qemu_dump_ext.structures.kdump import DISK_DUMP_HEADER, KDUMP_SUB_HEADER, PAGE_DESCRIPTOR


@pytest.mark.parametrize(
    ("abi", "sizes"),
    [
        # Of makedumpfile and crash on LP64, of QEMU for every 32-bit guest, of the Arm ABI.
        (Abi("little", 8, 8), (464, 104)),
        (Abi("little", 4, 4), (452, 80)),
        (Abi("big", 4, 8), (452, 96)),
    ],
)
def test_kdump_headers_have_the_sizes_of_their_readers(abi: Abi, sizes: tuple[int, int]):
    assert (DISK_DUMP_HEADER.bind(abi).size, KDUMP_SUB_HEADER.bind(abi).size) == sizes
    assert PAGE_DESCRIPTOR.bind(abi).size == 24


def test_elf_structures_are_laid_out_as_the_compiler_does(tmp_path: Path):
    structures = {
        ("Ehdr", 8): EHDR,
        ("Phdr", 8): phdr_layout(8),
        ("Shdr", 8): SHDR,
        ("Ehdr", 4): EHDR,
        ("Phdr", 4): phdr_layout(4),
        ("Shdr", 4): SHDR,
        ("Nhdr", 8): NHDR,
    }
    lines, expected = [], []
    for (name, word), layout in structures.items():
        c_name = f"Elf{8 * word}_{name}"
        bound = layout.bind(elf_abi("little", word))
        lines.append(f'printf("%zu\\n", sizeof({c_name}));')
        expected.append(bound.size)
        for member, offset in bound.offsets.items():
            lines.append(f'printf("%zu\\n", offsetof({c_name}, {member}));')
            expected.append(offset)
    source = tmp_path / "offsets.c"
    source.write_text(
        "#include <elf.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    )
    program = tmp_path / "offsets"
    subprocess.run(["gcc", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert [int(number) for number in output.split()] == expected


def test_a_member_that_does_not_exist_is_refused():
    structure = StructLayout("pair", fields_of("u32", "first second")).bind(Abi("little", 4, 4))
    with pytest.raises(TypeError, match="third"):
        structure.pack(first=1, third=3)


def test_what_is_not_named_is_zero_and_byte_order_counts():
    layout = StructLayout("mixed", (Field("small", "u16"), Field("large", "u64")))
    assert layout.bind(Abi("big", 8, 8)).pack(large=0x0102) == bytes(8) + bytes(6) + b"\x01\x02"
    assert layout.bind(Abi("little", 8, 1)).pack(small=0x0102) == b"\x02\x01" + bytes(8)
