"""A QMP peer that lies costs a dump at most: never the guest, nor a file that is not whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_dump_ext.cli.dump_command import main
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.guest_images.machine import QemuMachine
from tests.support.bare_crashes import bare_machine
from tests.support.doors import guest_status
from tests.support.lying_qmp import WRONG_KINDS, LyingQmp
from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until

pytestmark = pytest.mark.qemu

_STATUS_OF_A_DUMP = {0, 6}
_STATUS_WITHOUT = {2, 3, 4}


@pytest.fixture(scope="module")
def spinning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuMachine]:
    with bare_machine(tmp_path_factory.mktemp("machine"), "spin") as machine:
        with RawQmp(machine.qmp_sockets[1]) as qmp:
            qmp.execute("cont")
        yield machine


def test_answers_of_the_wrong_kind(
    tmp_path: Path, spinning: QemuMachine, capsys: pytest.CaptureFixture[str]
):
    seen = {"qmp_capabilities"}
    with LyingQmp(spinning.qmp_sockets[0], tmp_path / "qmp").running() as liar:
        for words in ([], ["-z", "--memory", "pmemsave"]):
            liar.asked.clear()
            assert main(["--qmp", str(liar.path), *words, str(tmp_path / "honest")]) == 0
            (tmp_path / "honest").unlink()
            # One of those that differ by an address alone.
            alike = {question.partition(" 0x")[0]: question for question in sorted(liar.asked)}
            for name in sorted(alike.keys() - seen):
                for kind in ("null", "wrong members", "deep"):
                    liar.lies = {alike[name]: WRONG_KINDS[kind]}
                    status = main(["--qmp", str(liar.path), *words, str(tmp_path / "dump")])
                    said = capsys.readouterr().err
                    _check(tmp_path, spinning, status, said, f"{name}, {kind}: {status}, {said}")
            liar.lies = {}
            seen |= alike.keys()
    assert {"query-status", "stop", "cont", "info mtree -f", "pmemsave"} <= seen


def _check(folder: Path, machine: QemuMachine, status: int, said: str, case: str) -> None:
    assert "Traceback" not in said, case
    assert len(max(said.splitlines(), key=len, default="")) < 1000, case
    wait_until(lambda: guest_status(machine) == "running", case)
    file = folder / "dump"
    if file.exists():
        assert status in _STATUS_OF_A_DUMP, case
        with open_dump(file) as dump:
            assert not verify_dump(dump).problems, case
        file.unlink()
    else:
        assert status in _STATUS_WITHOUT, case
    assert {path.name for path in folder.iterdir()} == {"qmp"}, case
