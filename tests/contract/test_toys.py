"""Adding an architecture, a memory source or a sink is adding one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext import architectures, memory_sources, sinks
from qemu_dump_ext.cli.dump_command import dump_parser
from qemu_dump_ext.cli.subcommands.targets import table_of_targets
from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.engine.info import describe_guest
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.options.dump_options import parse_dump_arguments
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.progress import ProgressMeter
from tests.support.fake_guest import FakeGuest, content_of, fake_guest
from tests.support.toys import toy_in


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    with fake_guest(tmp_path) as guest:
        yield guest


def _dump(guest: FakeGuest, target: object, memory: str = "auto") -> DumpReport:
    sink = sinks.open_sink(str(target), force=False, standard_output=None)
    with sink:
        return dump(DumpRequest(), guest.access, sink, memory=memory, progress=ProgressMeter(None))


def _memory(guest: FakeGuest) -> bytes:
    return b"".join(map(content_of, guest.blocks))


def test_an_architecture(tmp_path: Path):
    registers = "ACC=000000ff PC=00001234\n"
    with (
        toy_in(architectures),
        fake_guest(tmp_path, cpu_type="any-toy-cpu", registers=registers) as guest,
    ):
        _dump(guest, tmp_path / "dump")
        assert describe_guest(guest.access).architecture == "toy"
        assert any("toy" in row for row in table_of_targets())
    content = (tmp_path / "dump").read_bytes()
    assert content[:6] == b"\x7fELF\x01\x02"
    assert int.from_bytes(content[18:20], "big") == 0x7077
    assert b"TOY\0" + bytes.fromhex("00000001 000000ff 00001234") in content
    assert content.endswith(_memory(guest))
    assert "toy" not in architectures.all_architectures()


def test_a_memory_source(guest: FakeGuest, tmp_path: Path):
    words = ["--memory", "toy", "FILE"]
    with toy_in(memory_sources):
        assert parse_dump_arguments(dump_parser(), words).memory == "toy"
        by_name = _dump(guest, tmp_path / "by name", "toy")
        fastest = _dump(guest, tmp_path / "fastest")
    assert by_name.memory_source == fastest.memory_source == "toy"
    content = (tmp_path / "by name").read_bytes()
    assert content == (tmp_path / "fastest").read_bytes()
    assert content.endswith(_memory(guest))
    with pytest.raises(RequestError, match="'toy'"):
        parse_dump_arguments(dump_parser(), words)


def test_a_sink(guest: FakeGuest, tmp_path: Path):
    path = tmp_path / "grows"
    path.write_bytes(b"before")
    with toy_in(sinks):
        assert "append:PATH" in dump_parser().format_help()
        report = _dump(guest, f"append:{path}")
    assert report.target == f"append:{path}"
    content = path.read_bytes()
    assert content.startswith(b"before\x7fELF")
    assert content.endswith(_memory(guest))
    assert "append:PATH" not in dump_parser().format_help()
