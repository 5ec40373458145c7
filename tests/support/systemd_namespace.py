"""What the first process in the namespaces of a systemd runs: `PROGRAM GROUP DIRECTORY...`.

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

_PRIVATE = ("/tmp", "/var/tmp", "/run", "/var/log")
_RUNTIME = Path("/run/user/0")
_CONTROL_GROUPS = "/sys/fs/cgroup"
_INSIDE = "--inside"


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def _make_private(shared: list[str]) -> None:
    kept = {path: os.open(path, os.O_PATH) for path in shared}
    for path in filter(os.path.isdir, _PRIVATE):
        _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", path)
    for path, descriptor in kept.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.path.samestat(Path(path).stat(), os.fstat(descriptor)):
            _mount("--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{descriptor}", path)
        os.close(descriptor)


def _mount_groups() -> None:
    # They cannot be mounted where they are on top.
    _mount("-t", "tmpfs", "tmpfs", _CONTROL_GROUPS)
    _mount("-t", "cgroup2", "none", _CONTROL_GROUPS)


def _enter_group(name: str) -> None:
    _mount("--make-rprivate", "/")
    _mount("-t", "proc", "proc", "/proc")
    _mount_groups()
    group = Path(_CONTROL_GROUPS, name)
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    words = [sys.executable, "-I", __file__, _INSIDE, *sys.argv[2:]]
    os.execvp("unshare", ["unshare", "--cgroup", *words])  # noqa: S606


def _start(shared: list[str]) -> None:
    # From now on, the group is all that is to be seen of groups.
    _mount_groups()
    _make_private(shared)
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
