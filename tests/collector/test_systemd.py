"""The agent as a service of a real systemd: a user's manager, in namespaces of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import yaml

from qemu_dump_ext.cli.collector.install import UNIT
from qemu_dump_ext.guest_images.machine import stopped_machine
from tests.support.doors import REPOSITORY, child_environment, guest_status
from tests.support.processes import children_of
from tests.support.systemd_namespace import COMMAND
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces"),
    pytest.mark.skipif(not Path("/lib/systemd/systemd").exists(), reason="needs systemd"),
]

_PROGRAM = Path(sys.executable).with_name("qemu-crash-collector")
_WATCHDOG_SECONDS = 6


class _Systemd:
    """Runs commands beside the manager."""

    def __init__(self, inside: int, directory: Path) -> None:
        self._enter = ["nsenter", "-t", str(inside), "-m", "-p", "-n", "-i", "-C", "--"]
        self._environment = child_environment(
            HOME=f"{directory}/home", XDG_RUNTIME_DIR="/run/user/0", PYTHONPATH=None
        )

    def run(self, *words: object) -> str:
        done = subprocess.run(
            [*self._enter, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env=self._environment,
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def control(self, *words: str) -> str:
        return self.run("systemctl", "--user", *words)

    def property(self, name: str) -> str:
        return self.control("show", "--property", name, "--value", UNIT).strip()


@contextmanager
def _systemd(directory: Path, *others: Path) -> Iterator[_Systemd]:
    group = f"qemu_dump_ext-{os.getpid()}"
    shared = [str(path) for path in (directory, *others, REPOSITORY)]
    init = subprocess.Popen(
        [
            *("unshare", "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child=SIGKILL"),
            *(*COMMAND, group, *shared, sys.prefix, sys.base_prefix),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    try:
        assert init.stdin is not None
        assert init.stdout is not None
        assert init.stdout.readline() == b"ready\n"
        yield _Systemd(children_of(init.pid)[0], directory)
    finally:
        init.communicate()
        _remove_group(group)


def _remove_group(name: str) -> None:
    # Groups may be mounted anywhere, or nowhere.
    commands = f"mount -t cgroup2 none /mnt && find /mnt/{name} -depth -type d -exec rmdir {{}} +"
    argv = ["unshare", "--mount", "sh", "-c", commands]
    wait_until(lambda: subprocess.run(argv, check=False, stderr=subprocess.DEVNULL).returncode == 0)


def _names(systemd: _Systemd, config: Path) -> Sequence[str]:
    lines = systemd.run(_PROGRAM, "guests", "--config", config).splitlines()[1:]
    return [line.split()[0] for line in lines if "prelaunch" in line]


def test_agent_is_ready_reloads_is_restarted_and_stops_as_systemd_says(tmp_path):
    config = tmp_path / "collector.yaml"
    with (
        stopped_machine(["qemu-system-x86_64"], ["-m", "16"]) as machine,
        _systemd(tmp_path, machine.qmp_sockets[0].parent) as systemd,
    ):

        def configure(name: str) -> None:
            guests = [{"socket": str(machine.qmp_sockets[0]), "name": name}]
            content = {"store": str(tmp_path / "store"), "guests": guests}
            config.write_text(yaml.safe_dump({**content, "scan_interval": 0.1}))

        configure("first")
        told = systemd.run(_PROGRAM, "install", "--user", "--config", config)
        assert (
            f"start it: systemctl --user daemon-reload && systemctl --user enable --now {UNIT}"
            in told
        )
        systemd.control("daemon-reload")
        systemd.control("enable", "--now", UNIT)  # comes back when the agent says it is ready
        assert systemd.property("ActiveState") == "active"
        wait_until(lambda: _names(systemd, config) == ["first"])

        configure("second")
        systemd.control("reload", UNIT)
        wait_until(lambda: _names(systemd, config) == ["second"])
        first = systemd.property("MainPID")
        assert systemd.property("NRestarts") == "0"

        drop_in = tmp_path / f"home/.config/systemd/user/{UNIT}.d/watchdog.conf"
        drop_in.parent.mkdir()
        drop_in.write_text(f"[Service]\nWatchdogSec={_WATCHDOG_SECONDS}\n")
        systemd.control("daemon-reload")
        systemd.control("restart", UNIT)
        hung = systemd.property("MainPID")
        assert hung != first
        heard = systemd.property("WatchdogTimestampMonotonic")
        wait_until(
            lambda: systemd.property("WatchdogTimestampMonotonic") != heard, "it is heard again"
        )
        assert (systemd.property("MainPID"), systemd.property("NRestarts")) == (hung, "0")
        systemd.run("kill", f"-{signal.SIGSTOP.value}", hung)
        wait_until(partial(_is_restarted, systemd, hung), "the watchdog restarts it")
        wait_until(lambda: _names(systemd, config) == ["second"])

        systemd.control("stop", UNIT)
        assert [systemd.property(name) for name in ("ActiveState", "Result")] == [
            "inactive",
            "success",
        ]
        assert guest_status(machine) == "prelaunch"


def _is_restarted(systemd: _Systemd, pid: str) -> bool:
    # It is active once it says that it is ready.
    told = {name: systemd.property(name) for name in ("MainPID", "NRestarts", "ActiveState")}
    return told["MainPID"] != pid and told["NRestarts"] != "0" and told["ActiveState"] == "active"
