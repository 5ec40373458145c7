"""Memory, registers and the way RAM lies, read from streams made by hand."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from qemu_dump_ext.architectures import all_architectures
from qemu_dump_ext.cli import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers._ram_layout import possible_layouts
from qemu_dump_ext.dump_readers.migration import MigrationFile
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import CorruptDumpError, UnsupportedTargetError
from qemu_dump_ext.structures.migration import MigrationStream, StreamBlock
from tests.support.sample_migration import (
    CONTINUE,
    CPU,
    DATA,
    EOF,
    EOS,
    HEAD,
    PAGE,
    RAM_NAME,
    ZERO,
    configuration,
    cpu_state,
    description,
    field,
    footer,
    make_migration,
    part,
    ram_pages,
    ram_start,
    ram_word,
    section,
)

_FULL = 4
_GIB = 1 << 30
_BASE = 0x80000000
_SV39 = 8 << 60
_VALID, _LEAF = 1, 0xF


def opened(path: Path, data: bytes) -> MigrationFile:
    path.write_bytes(data)
    dump = open_dump(path)
    assert isinstance(dump, MigrationFile)
    return dump


def _mapped(gva: int) -> bytes:
    """Return RAM that begins with page tables (Sv39) which map 1 GiB around `gva` to RAM."""
    table = bytearray(PAGE)
    index = gva >> 30 & 511
    entry = (_BASE >> 12) << 10 | _LEAF
    table[8 * index : 8 * index + 8] = entry.to_bytes(8, "little")
    return bytes(table) + b"content!" * (PAGE // 8)


def test_a_guest_is_what_its_stream_says(tmp_path: Path):
    with opened(tmp_path / "s", make_migration(b"\1" * PAGE + bytes(PAGE) + b"\2" * 9)) as dump:
        assert (dump.format, dump.byte_order, dump.word_size) == ("migration", "little", 8)
        assert dump.architecture.name == "riscv64"
        assert dump.vcpus[0].registers["x7"] == 7
        assert dump.vcpus[0].registers["pc"] == _BASE
        assert list(dump.memory_ranges()) == [(_BASE, 3 * PAGE)]
        assert dump.read(_BASE + PAGE - 1, PAGE + 2) == b"\1" + bytes(PAGE) + b"\2"
        assert dump.populated(_BASE, 3 * PAGE) == [
            (_BASE, _BASE + PAGE),
            (_BASE + 2 * PAGE, _BASE + 3 * PAGE),
        ]
        assert dump.layout_proof is None
        assert not dump.missing_registers


def test_page_tables_that_lead_to_the_program_counter_prove_the_layout(tmp_path: Path):
    data = make_migration(_mapped(_BASE), satp=_SV39 | _BASE >> 12)
    with opened(tmp_path / "s", data) as dump:
        assert dump.layout_proof == "the page tables of a vCPU lead to its program counter"


def test_page_tables_that_lead_nowhere_are_not_believed(tmp_path: Path):
    data = make_migration(_mapped(_BASE + 5 * _GIB), satp=_SV39 | _BASE >> 12)
    path = tmp_path / "s"
    path.write_bytes(data)
    with pytest.raises(UnsupportedTargetError, match="lies otherwise than is known"):
        open_dump(path)


def test_a_page_that_comes_again_counts(tmp_path: Path):
    ram = part(2, ram_word(PAGE, ZERO | CONTINUE) + b"\0" + ram_word(0, EOS))
    ram += part(2, ram_word(0, DATA | CONTINUE) + b"\5" * PAGE + ram_word(0, EOS))
    ram += part(2, ram_word(2 * PAGE, ZERO | CONTINUE) + b"\xa5" + ram_word(0, EOS))
    whole = make_migration(b"\1" * (3 * PAGE))
    end = whole.index(footer(2), whole.index(b"\1" * PAGE)) + 5
    with opened(tmp_path / "s", whole[:end] + ram + whole[end:]) as dump:
        assert dump.read(_BASE, 3 * PAGE) == b"\5" * PAGE + bytes(PAGE) + b"\xa5" * PAGE
        assert verify_dump(dump).zero_pages == 1


def test_a_stream_without_vcpus_is_refused_with_the_reason(tmp_path: Path):
    whole = make_migration(b"\1" * PAGE + b"\2" * PAGE)
    path = tmp_path / "s"
    path.write_bytes(whole[: whole.index(b"\2" * PAGE) + 9])
    with pytest.raises(CorruptDumpError, match="machine virt: the stream ends at offset"):
        open_dump(path)


def test_memory_that_no_machine_has_is_not_walked_page_by_page(tmp_path: Path):
    data = HEAD + configuration("virt") + ram_start({RAM_NAME: 1 << 50})
    data += part(2, ram_word((1 << 50) - PAGE, DATA, RAM_NAME) + b"\1" * PAGE + ram_word(0, EOS))
    data += section(_FULL, 3, "cpu", cpu_state()) + EOF + description([CPU])
    tracemalloc.start()
    with opened(tmp_path / "s", data) as dump:
        end = _BASE + (1 << 50)
        assert dump.populated(_BASE, 1 << 50) == [(end - PAGE, end)]
        assert not verify_dump(dump).problems
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def _layouts(
    target: str, machine: str, blocks: Mapping[str, int]
) -> Sequence[Sequence[tuple[int, int, int, int]]]:
    stream = MigrationStream(machine, blocks=[StreamBlock(*item) for item in blocks.items()])
    found = possible_layouts(stream, all_architectures()[target])
    return [[(p.gpa, p.block, p.offset, p.size) for p in pieces] for pieces in found]


@pytest.mark.parametrize(
    ("machine", "size", "below_4g"),
    [
        ("pc-q35-7.2", 2 * _GIB, 2 * _GIB),
        ("pc-q35-7.2", 0xB0000000, 0x80000000),
        ("pc-q35-11.1", 8 * _GIB, 0x80000000),
        ("pc-i440fx-7.2", 3 * _GIB, 3 * _GIB),
        ("pc-i440fx-7.2", 0xE0000000, 0xC0000000),
        ("microvm", 4 * _GIB, 0xC0000000),
    ],
)
def test_where_a_pc_has_its_memory(machine: str, size: int, below_4g: int):
    blocks = {"pc.ram": size, "pc.bios": 0x40000, "0000:00:02.0/vga.vram": 16 << 20}
    expected = [(0, 0, 0, 0xA0000), (0xC0000, 0, 0xC0000, below_4g - 0xC0000)]
    expected.append((0xFFFC0000, 1, 0, 0x40000))
    if size > below_4g:
        expected.append((4 * _GIB, 0, below_4g, size - below_4g))
    assert _layouts("x86_64", machine, blocks)[0] == expected


def test_without_a_graphics_card_there_is_memory_where_its_screen_would_be():
    assert _layouts("x86_64", "pc-q35-7.2", {"pc.ram": _GIB})[0] == [(0, 0, 0, _GIB)]


def test_memory_of_several_nodes_is_one_behind_the_other():
    layouts = _layouts("aarch64", "virt-7.2", {"virt.flash0": 1 << 26, "n1": 64, "n0": 32})
    assert layouts[0] == [(_GIB, 2, 0, 32), (_GIB + 32, 1, 0, 64)]
    assert layouts[1] == [(_GIB, 1, 0, 64)]


def test_a_machine_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(UnsupportedTargetError, match="known: pc-q35, pc-i440fx, microvm") as error:
        _layouts("x86_64", "isapc", {"pc.ram": 64})
    assert "a machine isapc of x86_64" in str(error.value)


def test_vcpus_that_are_not_known_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = {"name": "cpu", "instance_id": 0, "fields": [field("env.gr", 8)]}
    data = HEAD + configuration("hppa") + ram_start({"ram": PAGE}) + ram_pages("ram", b"\1" * PAGE)
    data += section(_FULL, 3, "cpu", bytes(8)) + EOF + description([other])
    path = tmp_path / "s"
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "machine hppa: unknown vCPUs" in said


def test_a_description_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "s"
    path.write_bytes(make_migration(b"\1" * PAGE))
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "machine_type  virt" in said
    assert "NT_PRSTATUS" in said
    assert f"{RAM_NAME}  {PAGE} bytes" in said
    assert main(["verify", str(path)]) == 0
