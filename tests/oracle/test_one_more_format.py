"""A format of one file is known to every door."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import qemu_dump_ext.dump_formats as package
from qemu_dump_ext.cli import dump_command
from qemu_dump_ext.crash_collector.config.settings import GuestEntry
from qemu_dump_ext.dump_formats import all_dump_formats
from qemu_dump_ext.engine.capabilities import query_capabilities
from qemu_dump_ext.errors import RequestError
from tests.support.plugins import one_more_file
from tests.support.raw_qmp import RawQmp

pytestmark = pytest.mark.qemu

TOY = '''
"""A line of JSON, and all guest memory."""

import json

from qemu_dump_ext.dump_formats import DumpFormat, FormatFamily
from qemu_dump_ext.errors import RequestError


def _check(request):
    if request.paging:
        raise RequestError("a toy has no paging")


def _write(request, plan, memory, sink, progress):
    blocks = [(block.gpa, block.size) for block in plan.ram_blocks]
    sink.write(json.dumps(blocks).encode() + b"\\n")
    for gpa, size in blocks:
        buffer = bytearray(size)
        memory.read_into(gpa, memoryview(buffer))
        sink.write(memoryview(buffer))
        progress(size)


FORMATS = FormatFamily(
    "toy", lambda: [DumpFormat("toy", "toy", write=_write, check=_check, whole_pages=True)]
)
'''


@pytest.fixture
def toy(tmp_path_factory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("toy")
    with one_more_file(package, folder, "toy", TOY, all_dump_formats):
        yield


@pytest.mark.usefixtures("toy")
def test_command_line(bare_machine, tmp_path, capsys):
    qmp, path = str(bare_machine.qmp_sockets[0]), tmp_path / "dump"
    words = ["--qmp", qmp, "--format", "toy", "--json", str(path)]
    assert dump_command.main([*words, "0x200001", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "toy"
    head, _, memory = path.read_bytes().partition(b"\n")
    assert json.loads(head) == [[0x200000, 0x1000]]
    with RawQmp(bare_machine.qmp_sockets[1]) as monitor:
        line = {"command-line": "xp /16xb 0x200000"}
        shown = monitor.execute("human-monitor-command", **line)
    assert memory[:16].hex() == "".join(
        byte.removeprefix("0x") for byte in shown.split() if byte.startswith("0x")
    )
    assert dump_command.main([*words, "-p"]) == RequestError.exit_status
    assert "a toy has no paging" in capsys.readouterr().err


@pytest.mark.usefixtures("toy")
def test_capabilities():
    assert "toy" in query_capabilities().formats


@pytest.mark.usefixtures("toy")
def test_crash_collector():
    assert GuestEntry(socket="/x", format="toy").format == "toy"


def test_without_the_file_it_is_unknown(capsys):
    assert dump_command.main(["--format", "toy", "x"]) == RequestError.exit_status
    assert "invalid choice: 'toy'" in capsys.readouterr().err
