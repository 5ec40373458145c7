"""A format of one file is known to every door."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from qemu_dump_ext import dump_formats
from qemu_dump_ext.cli import dump_command
from qemu_dump_ext.crash_collector.config.settings import GuestEntry
from qemu_dump_ext.engine.capabilities import query_capabilities
from qemu_dump_ext.errors import RequestError
from tests.support.raw_qmp import RawQmp
from tests.support.toys import toy_in

pytestmark = pytest.mark.qemu


@pytest.fixture
def toy() -> Iterator[None]:
    with toy_in(dump_formats):
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
