"""A real libvirtd, in namespaces of its own: nothing of the machine's is touched by it.

Its processes, its /run, /var/lib and /tmp are its own; so is its network, which is empty. What is
to see its domains runs in there as well.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from tests.support.doors import REPOSITORY, child_environment, cli_argv
from tests.support.libvirt_namespace import COMMAND
from tests.support.processes import EnteredProcess, children_of
from tests.support.waiting import SECONDS, wait_until

SYSTEM, SESSION = "qemu:///system", "qemu:///session"
_SESSION_USER = 12345
_MAIN = "import sys; from qemu_dump_ext.entry import {} as run; sys.exit(run())"


def missing_for_libvirt() -> str | None:
    """Return what this machine lacks for a libvirtd, or None."""
    programs = ("libvirtd", "virsh", "unshare", "nsenter")
    lacking = [name for name in programs if shutil.which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    return None if os.geteuid() == 0 else "only root can make the namespaces"


class LibvirtHost:
    """The namespaces; libvirtd runs in them.

    Attributes:
        directory: At the same place inside and outside.
        uri: Of the daemon's connection.
    """

    def __init__(self, directory: Path, uri: str = SYSTEM) -> None:
        self.directory = directory
        self.uri = uri
        self._daemon: EnteredProcess[Any] | None = None
        self._init = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--net", "--ipc", "--fork"),
                *("--kill-child=SIGKILL", *COMMAND),
                *(str(path) for path in (directory, REPOSITORY, Path(sys.prefix))),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == b"ready\n"
        self._inside = str(children_of(self._init.pid)[0])
        if uri == SESSION:
            (directory / "runtime").mkdir(mode=0o700)
            os.chown(directory / "runtime", _SESSION_USER, _SESSION_USER)
            directory.chmod(0o777)

    @property
    def runtime(self) -> Path:
        """Where the daemon keeps what it knows of domains that run."""
        if self.uri == SESSION:
            return self.directory / "runtime" / "libvirt"
        return Path(f"/proc/{self._inside}/root/run/libvirt")

    def argv(self, *words: object) -> list[str]:
        """Return the command line that runs `words` inside."""
        enter = ["nsenter", "-t", self._inside, "-m", "-p", "-n", "-i", f"-w{self.directory}", "--"]
        if self.uri == SESSION:
            rights = "+dac_override,+dac_read_search"  # to see this Python, wherever it is
            enter += ["setpriv", f"--reuid={_SESSION_USER}", f"--regid={_SESSION_USER}"]
            enter += ["--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
            enter += ["env", f"XDG_RUNTIME_DIR={self.directory / 'runtime'}"]
            enter += [f"HOME={self.directory / 'runtime'}"]
        return [*enter, *map(str, words)]

    def popen(self, *words: object, **options: Any) -> EnteredProcess[Any]:
        """Start a program inside."""
        return EnteredProcess(self.argv(*words), **{"env": child_environment(), **options})

    def run(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program inside to its end."""
        defaults: dict[str, Any] = {"env": child_environment(), "stdin": subprocess.DEVNULL}
        defaults |= {"capture_output": True, "text": True, "timeout": SECONDS}
        if "input" in options:
            del defaults["stdin"]
        return subprocess.run(self.argv(*words), check=False, **(defaults | options))

    def cli(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `qemu-dump-guest-memory` inside."""
        return self.run(*cli_argv(*words), **options)

    def program(self, entry: str, *words: object, **options: Any) -> Any:
        """Run another of our programs inside, by its function of the entry module."""
        return self.run(sys.executable, "-c", _MAIN.format(entry), *words, **options)

    def virsh(self, *words: object) -> str:
        """Run virsh, which must succeed; returns what it prints."""
        done = self.run("virsh", "-q", "-c", self.uri, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start_daemon(self) -> None:
        """Start libvirtd; returns when it answers."""
        with (self.directory / "libvirtd.log").open("ab") as log:
            self._daemon = self.popen(
                *("prlimit", "--nofile=1024", "libvirtd"), stdout=log, stderr=log
            )
        wait_until(lambda: self.daemon_runs() is False or self._answers(), "libvirtd answers")
        assert self.daemon_runs(), (self.directory / "libvirtd.log").read_text()

    def _answers(self) -> bool:
        # virsh would start a daemon of the session itself, which takes the place of this one.
        words = ("env", "LIBVIRT_AUTOSTART=0", "virsh", "-q", "-c", self.uri, "uri")
        return self.run(*words).returncode == 0

    def daemon_runs(self) -> bool:
        """Tell whether libvirtd has not ended."""
        return self._daemon is not None and self._daemon.poll() is None

    def stop_daemon(self, number: int = signal.SIGTERM) -> None:
        """End libvirtd; its domains run on."""
        assert self._daemon is not None
        self._daemon.send_signal(number)
        self._daemon.wait(SECONDS)

    def pids_of(self, program: str) -> list[int]:
        """Return the processes inside that run a program, as they are numbered outside."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if (
                    entry.name.isdecimal()
                    and (entry / "ns/pid").samefile(f"/proc/{self._inside}/ns/pid")
                    and (entry / "comm").read_text().strip() == program
                ):
                    found.append(int(entry.name))
        return found

    def create(self, name: str, *, paused: bool = True, qmp: bool = True, **options: Any) -> Domain:
        """Let libvirt start a domain that has no disk and does nothing.

        Args:
            name: Of the domain.
            paused: Its vCPUs do not run.
            qmp: QEMU listens for a second client of QMP.
            options: Of `domain_xml`.
        """
        socket = self.directory / f"{name}.qmp"
        path = self.directory / f"{name}.xml"
        path.write_text(domain_xml(name, qmp=socket if qmp else None, **options))
        self.virsh("create", *(["--paused"] if paused else []), path)
        return Domain(self, name, socket)

    def close(self) -> None:
        """End everything inside."""
        with self._init:  # closes its standard input, which ends it, and waits
            pass
        if self._daemon is not None:
            self._daemon.wait(SECONDS)

    @contextmanager
    def running(self) -> Iterator[LibvirtHost]:
        """Run libvirtd inside the block."""
        try:
            self.start_daemon()
            yield self
        finally:
            self.close()


class Domain:
    """A domain.

    Attributes:
        host: Where it runs.
        name: Of the domain.
        qmp: Its second QMP socket, which libvirt does not use.
    """

    def __init__(self, host: LibvirtHost, name: str, qmp: Path) -> None:
        self.host = host
        self.name = name
        self.qmp = qmp

    def state(self) -> str:
        """Return what libvirt says of it, such as `paused (user)`."""
        return self.host.virsh("domstate", "--reason", self.name)

    def exists(self) -> bool:
        """Tell whether libvirt still has it."""
        return self.name in self.host.virsh("list", "--all", "--name").splitlines()

    def panic(self) -> None:
        """Have QEMU believe that the guest has said so to its device."""
        self.monitor("o /b 0x505 1")

    def monitor(self, command: str) -> str:
        """Return the answer of the human monitor, by libvirt."""
        return self.host.virsh("qemu-monitor-command", self.name, "--hmp", command)

    def pid(self) -> int:
        """Return its process, as it is numbered inside."""
        folder = "qemu/run" if self.host.uri == SESSION else "qemu"
        return int((self.host.runtime / folder / f"{self.name}.pid").read_text())


def domain_xml(
    name: str,
    *,
    qmp: Path | None = None,
    memory: int = 16,
    vcpus: int = 1,
    on_crash: str | None = "preserve",
    panic: bool = False,
    features: str = "",
    devices: str = "",
    arguments: Sequence[str] = (),
    boot: str = "",
) -> str:
    """Return the XML of a domain.

    Args:
        name: Of the domain.
        qmp: Where QEMU listens for a second client of QMP; None: nowhere.
        memory: The size in MiB.
        vcpus: How many vCPUs.
        on_crash: What libvirt does when the guest panics; None: it says nothing of that.
        panic: It has a pvpanic device.
        features: More XML of that element.
        devices: More XML of that element.
        arguments: More of QEMU's command line.
        boot: More XML of the element `os`.
    """
    words = [*arguments]
    if qmp is not None:
        words += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    command_line = "".join(f"<qemu:arg value={_quoted(word)}/>" for word in words)
    emulator = shutil.which("qemu-system-x86_64")
    return f"""
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{escape(name)}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>{vcpus}</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os>
  <features>{features}</features>
  {"" if on_crash is None else f"<on_crash>{on_crash}</on_crash>"}
  <devices>
    <emulator>{emulator}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {"<panic model='isa'/>" if panic else ""}
    {devices}
  </devices>
  <qemu:commandline>{command_line}</qemu:commandline>
</domain>
"""


def _quoted(word: str) -> str:
    return "'" + escape(word, {"'": "&apos;"}) + "'"
