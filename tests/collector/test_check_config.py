"""What a configuration says of this host, in the words of whoever wrote it."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qemu_dump_ext.cli.collector.install import UNIT, unit_text
from qemu_dump_ext.cli.crash_collector_command import main
from tests.support.bare_crashes import bare_machine
from tests.support.raw_qmp import RawQmp


def check(directory: Path, capsys: Any, **configuration: object) -> tuple[int, str]:
    config = directory / "collector.yaml"
    defaults: dict[str, object] = {"store": str(directory / "store"), "guests": [{"socket": "/x"}]}
    config.write_text(yaml.safe_dump(defaults | configuration))
    status = main(["check-config", "--config", str(config)])
    told = capsys.readouterr()
    return status, told.out + told.err


@pytest.mark.parametrize(
    ("configuration", "said"),
    [
        ({"store": "/proc/crashes"}, "store: /proc/crashes is on /proc, which keeps no files"),
        ({"store": "/dev/null"}, "store: /dev/null is no directory"),
        ({"store": "/dev/null/x"}, "store: /dev/null is no directory"),
        ({"report": "/nowhere/report.html"}, "report: there is no directory /nowhere; make it"),
        ({"control": "/nowhere/control"}, "control: there is no directory /nowhere; make it"),
        ({"guests": []}, "guests: there are none"),
    ],
)
def test_what_would_not_work_on_this_host_is_said(tmp_path, capsys, configuration, said):
    status, told = check(tmp_path, capsys, **configuration)
    assert status == 1
    assert said in told


def test_what_is_right_makes_nothing(tmp_path, capsys):
    status, told = check(tmp_path, capsys)
    assert status == 0
    assert "there is no such socket now" in told
    assert not (tmp_path / "store").exists()


def test_missing_console_and_a_socket_that_another_holds_are_said(tmp_path, capsys):
    with bare_machine(tmp_path, "halt") as machine:
        guest = {"socket": str(machine.qmp_sockets[0]), "console": str(tmp_path / "none.log")}
        _, free = check(tmp_path, capsys, guests=[guest])
        with RawQmp(machine.qmp_sockets[0]):
            status, held = check(tmp_path, capsys, guests=[guest])
    assert f"there is no console file {tmp_path}/none.log now" in free
    assert "somebody else is connected" not in free
    assert status == 0
    assert "somebody else is connected to it: give the agent a socket of its own" in held


def test_unit_starts_this_program(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    config = tmp_path / "a config.yaml"
    assert main(["install", "--user", "--config", str(config)]) == 0
    told = capsys.readouterr().out
    unit = tmp_path / "systemd/user" / UNIT
    assert f"written: {unit}" in told
    assert f"still to be written: {config}" in told
    (line,) = [one for one in unit.read_text().splitlines() if one.startswith("ExecStart=")]
    words = shlex.split(line.removeprefix("ExecStart="))
    assert os.access(words[0], os.X_OK)
    assert words[1:] == ["run", "--config", str(config)]
    assert "Capabilities" not in unit.read_text()
    assert "WantedBy=default.target" in unit.read_text()
    unit.write_text("mine")
    assert main(["install", "--user", "--config", str(config)]) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert unit.read_text() == "mine"


def test_user_has_a_configuration_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = tmp_path / "qemu-crash-collector.yaml"
    assert main(["install", "--user"]) == 0
    assert f"still to be written: {own}" in capsys.readouterr().out
    assert f"run --config {own}" in (tmp_path / "systemd/user" / UNIT).read_text()
    own.write_text(f"store: {tmp_path}/store\nguests: [{{directory: {tmp_path}}}]\n")
    assert main(["check-config"]) == 0
    assert capsys.readouterr().out.startswith(f"{own}: ok; ")


@pytest.mark.parametrize("user", [True, False])
def test_systemd_understands_the_unit(tmp_path, user):
    program = tmp_path / "with space 100%" / "qemu-crash-collector"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / UNIT).write_text(unit_text(program, tmp_path / "c.yaml", user=user))
    words = ["systemd-analyze", "verify", "--man=no", *(["--user"] if user else [])]
    done = subprocess.run(
        [*words, str(tmp_path / UNIT)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )
    ours = [line for line in done.stderr.splitlines() if UNIT in line]
    assert ours == []
