"""What the first process in the namespaces of a systemd runs: `COMMAND GROUP DIRECTORY...`.

It makes everything private that systemd writes to, but for the directories named, and has a
control group of its own; starts a manager of a user's services; says so by a line; and ends, with
everything in the namespaces, when its standard input does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support.private_mounts import make_private, mount

_PRIVATE = ("/tmp", "/var/tmp", "/run", "/var/log")
_RUNTIME = Path("/run/user/0")
_CONTROL_GROUPS = "/sys/fs/cgroup"
_INSIDE = "--inside"
COMMAND = (sys.executable, "-E", "-s", "-m", "tests.support.systemd_namespace")
"""Runs this file, in the directory of the repository."""


def _mount_groups() -> None:
    # They cannot be mounted where they are on top.
    mount("-t", "tmpfs", "tmpfs", _CONTROL_GROUPS)
    mount("-t", "cgroup2", "none", _CONTROL_GROUPS)


def _enter_group(name: str) -> None:
    mount("--make-rprivate", "/")
    mount("-t", "proc", "proc", "/proc")
    _mount_groups()
    group = Path(_CONTROL_GROUPS, name)
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    words = [*COMMAND, _INSIDE, *sys.argv[2:]]
    os.execvp("unshare", ["unshare", "--cgroup", *words])  # noqa: S606


def _start(shared: list[str]) -> None:
    # From now on, the group is all that is to be seen of groups.
    _mount_groups()
    make_private(_PRIVATE, shared)
    Path("/run/systemd/system").mkdir(parents=True)  # as where systemd has booted the host
    _RUNTIME.mkdir(parents=True, mode=0o700)
    words = ["/lib/systemd/systemd", "--user", "--log-target=null", "--unit=basic.target"]
    home = {
        "HOME": f"{shared[0]}/home",
        "XDG_RUNTIME_DIR": str(_RUNTIME),
        "PATH": os.environ["PATH"],
    }
    manager = subprocess.Popen(words, env=home, stdin=subprocess.DEVNULL)
    while not (_RUNTIME / "systemd/private").exists():
        if manager.poll() is not None:
            sys.exit(f"systemd has ended: {manager.returncode}")
        time.sleep(0.02)
    print("ready", flush=True)
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == _INSIDE:
        _start(sys.argv[2:])
    _enter_group(sys.argv[1])
