"""Start QEMU with sockets to take dumps through, and boot guests in it."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.guest_images.initramfs import build_initramfs
from qemu_dump_ext.guest_images.manifest import GuestImage
from qemu_dump_ext.guest_images.store import FetchedImage

_SUN_PATH_MAX = 107  # bytes: sizeof(sockaddr_un.sun_path) without the final NUL
_LISTENING = 0x10000  # __SO_ACCEPTCON in the flags column of /proc/net/unix
_POLL_SECONDS = 0.02
_START_SECONDS = 120
_FILL_MIB_PER_SECOND = 10  # slowest that a fill may be; TCG reaches tens of times as much
_KERNEL_NEEDS_MIB = 128

BootProgress = Callable[[float, str], None]
"""Is told, now and then, the seconds since the start and the last line on the console."""


class QemuMachine:
    """A QEMU process with two QMP sockets, a gdbstub and a serial console; killed on leaving.

    Attributes:
        argv: The whole command line.
        folder: Private; has the sockets and the console's log.
        qmp_sockets: Two, each for one client at a time.
        gdb_socket: The socket of the gdbstub.
        console_socket: Serial console; its one client is this object until `release()`.
        console_log: All that the guest wrote on the console.
    """

    def __init__(
        self,
        command: Sequence[str],
        arguments: Sequence[str],
        *,
        qmp_socket: Path | None = None,
        gdb_socket: Path | None = None,
    ) -> None:
        """Prepare; QEMU starts on entering.

        Args:
            command: QEMU, with what must come first on its command line.
            arguments: Added to those for sockets and console.
            qmp_socket: Where the first QMP socket shall be.
            gdb_socket: Where the gdbstub shall be.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="qemu-dump-"))
        self.qmp_sockets = (qmp_socket or self.folder / "qmp", self.folder / "qmp2")
        self.gdb_socket = gdb_socket or self.folder / "gdb"
        self.console_socket = self.folder / "console"
        self.console_log = self.folder / "console.log"
        self._stderr_path = self.folder / "stderr"
        self.argv = [*command, "-nodefaults", "-display", "none", *self._channels(), *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._console: socket.socket | None = None
        self._released = False

    def _channels(self) -> list[str]:
        channels = []
        for path in self.qmp_sockets:
            channels += ["-qmp", f"unix:{_escape(path)},server=on,wait=off"]
        console = (
            f"socket,id=console,path={_escape(self.console_socket)},server=on,wait=off,"
            f"logfile={_escape(self.console_log)}"
        )
        channels += ["-chardev", console, "-serial", "chardev:console"]
        # Last: a gdbstub that listens tells that the machine has been built.
        return [*channels, "-gdb", f"unix:{_escape(self.gdb_socket)},server=on,wait=off"]

    @property
    def pid(self) -> int:
        """The ID of QEMU's process."""
        return self._running().pid

    def start(self) -> None:
        """Start QEMU and return once all sockets can be connected to.

        Raises:
            RequestError: A socket's path is too long, or the program is missing.
            SourceError: QEMU ended at once.
        """
        sockets = (*self.qmp_sockets, self.gdb_socket, self.console_socket)
        for path in sockets:
            if len(str(path).encode()) > _SUN_PATH_MAX:
                raise RequestError(
                    f"{path} is longer than the {_SUN_PATH_MAX} bytes that a socket may have",
                    hint="use a shorter path, or set TMPDIR to one",
                )
        with self._stderr_path.open("wb") as stderr:
            try:
                self._process = subprocess.Popen(
                    self.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    start_new_session=True,  # Ctrl-C is for us, and a detached QEMU outlives us
                )
            except OSError as error:
                raise RequestError(f"cannot start {self.argv[0]}: {error.strerror}") from error
        deadline = time.monotonic() + _START_SECONDS
        while not _all_listening(sockets):
            self._check_running()
            if time.monotonic() > deadline:
                raise SourceError(f"QEMU has no sockets after {_START_SECONDS} s")
            time.sleep(_POLL_SECONDS)
        self._console = socket.socket(socket.AF_UNIX)
        self._console.connect(str(self.console_socket))
        threading.Thread(target=_drain, args=(self._console,), daemon=True).start()

    def console_text(self) -> str:
        """Return all that the guest wrote on its console, with plain line ends."""
        if not self.console_log.exists():
            return ""
        return self.console_log.read_bytes().decode("utf-8", "replace").replace("\r", "")

    def send_console(self, text: str) -> None:
        """Type `text` on the console; a line ends with a newline.

        Raises:
            SourceError: QEMU has ended.
        """
        self._check_running()
        if self._console is not None:
            self._console.sendall(text.encode())

    def wait_for_console(
        self,
        wanted: str | re.Pattern[str],
        *,
        timeout_seconds: float,
        failure: re.Pattern[str] | None = None,
        on_progress: BootProgress | None = None,
    ) -> str:
        """Return the console's text once `wanted` has appeared.

        Args:
            wanted: A whole line, or a pattern to search for.
            timeout_seconds: How long it may take.
            failure: Ends the wait as soon as it appears.
            on_progress: Is told once a second.

        Raises:
            SourceError: It did not appear.
        """
        pattern = (
            re.compile(rf"^{re.escape(wanted)}$", re.MULTILINE)
            if isinstance(wanted, str)
            else wanted
        )
        start = told = time.monotonic()
        while True:
            text = self.console_text()
            now = time.monotonic()
            if pattern.search(text):
                return text
            if failure and (match := failure.search(text)):
                line = text[match.start() :].partition("\n")[0]
                raise SourceError(f"the guest failed: {line}")
            self._check_running()
            last_line = (text.rstrip().splitlines() or ["nothing"])[-1]
            if now - start > timeout_seconds:
                raise SourceError(
                    f"the guest did not say {pattern.pattern!r} within {timeout_seconds:.0f} s; "
                    f"the last line on its console: {last_line}"
                )
            if on_progress and now - told >= 1:
                told = now
                on_progress(now - start, last_line)
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Leave QEMU running and its folder in place; the console is free for another client."""
        self._released = True
        self._close_console()

    def is_running(self) -> bool:
        """Tell whether QEMU still runs."""
        return self._running().poll() is None

    def stop(self) -> None:
        """Kill QEMU and remove the folder, unless it was released."""
        if self._released:
            return
        self._close_console()
        if self._process:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in (self.qmp_sockets[0], self.gdb_socket):
            if path.is_socket():  # elsewhere, as the caller wished
                path.unlink()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise SourceError("QEMU has not been started")
        return self._process

    def _check_running(self) -> None:
        status = self._running().poll()
        if status is not None:
            complaints = self._stderr_path.read_text("utf-8", "replace").strip().splitlines()
            reason = complaints[-1] if complaints else f"exit status {status}"
            raise SourceError(f"QEMU ended: {reason}")

    def _close_console(self) -> None:
        if self._console is not None:
            self._console.close()
            self._console = None


def stopped_machine(command: Sequence[str], arguments: Sequence[str] = ()) -> QemuMachine:
    """Return a machine that needs no guest: 64 MiB of RAM, vCPUs that never run.

    Args:
        command: QEMU, such as `["qemu-system-x86_64"]`.
        arguments: The arguments, such as `["-M", "q35"]`.
    """
    return QemuMachine(command, ["-S", "-m", "64", *arguments])


class BootedGuest(QemuMachine):
    """A guest of the manifest; on entering it is booted until it shows its marker.

    Attributes:
        image: What was booted.
        files: What it was booted from.
    """

    def __init__(
        self,
        image: GuestImage,
        files: FetchedImage,
        *,
        command: Sequence[str] | None = None,
        memory_mib: int | None = None,
        cpus: int | None = None,
        fill_mib: int = 0,
        fill_disk: Path | None = None,
        kernel_arguments: str = "",
        arguments: Sequence[str] = (),
        qmp_socket: Path | None = None,
        gdb_socket: Path | None = None,
        on_progress: BootProgress | None = None,
    ) -> None:
        """Prepare; QEMU starts on entering.

        Args:
            image: Which guest.
            files: The files as fetched.
            command: Another QEMU than the manifest's.
            memory_mib: Other than the manifest's, which grows with what is to be filled.
            cpus: Other than the manifest's.
            fill_mib: How much guest memory to fill before the marker appears.
            fill_disk: Where the content for it is (`ImageStore.fill_disk`).
            kernel_arguments: Added to the manifest's.
            arguments: Added to QEMU's command line.
            qmp_socket: Where the first QMP socket shall be.
            gdb_socket: Where the gdbstub shall be.
            on_progress: Is told about the boot.

        Raises:
            RequestError: The memory is too small to be filled so far.
        """
        # In steps of the manifest's size: some machines refuse others.
        memory_mib = memory_mib or (1 + -(-fill_mib // image.memory_mib)) * image.memory_mib
        if fill_mib and memory_mib < fill_mib + _KERNEL_NEEDS_MIB:
            raise RequestError(
                f"{memory_mib} MiB of guest memory cannot be filled with {fill_mib} MiB",
                hint=f"the guest itself needs {_KERNEL_NEEDS_MIB} MiB",
            )
        self.image = image
        self.files = files
        self._fill_mib = fill_mib
        self._on_progress = on_progress
        command_line = f"{image.kernel_arguments} {kernel_arguments}".strip()
        options = [*image.machine, "-m", f"{memory_mib}M", "-smp", str(cpus or image.cpus)]
        # A panicked guest stays for a dump; a reboot would hide that something went wrong.
        options += ["-action", "panic=pause", "-no-reboot"]
        for device in image.devices:
            options += ["-device", device]
        if fill_mib:
            command_line += f" fill_mib={fill_mib}"
            drive = f"id=fill,if=none,format=raw,readonly=on,file={_escape(fill_disk or Path())}"
            options += ["-drive", drive, "-device", "virtio-blk,drive=fill"]
        super().__init__(command or [image.qemu], [], qmp_socket=qmp_socket, gdb_socket=gdb_socket)
        self._initramfs = self.folder / "initramfs"
        boot = ["-kernel", str(files.kernel), "-initrd", str(self._initramfs)]
        self.argv += [*options, *boot, "-append", command_line, *arguments]

    def start(self) -> None:
        """Boot; return once the marker is on the console.

        Raises:
            RequestError: QEMU cannot be started like this.
            SourceError: The guest did not boot; says why.
        """
        self._initramfs.write_bytes(
            build_initramfs(
                self.image,
                busybox=self.files.busybox,
                modules_folder=self.files.modules_folder,
                fill=self._fill_mib > 0,
            )
        )
        super().start()
        self.wait_for_console(
            self.image.marker,
            timeout_seconds=self.image.timeout_seconds + self._fill_mib / _FILL_MIB_PER_SECOND,
            failure=self.image.failure_pattern,
            on_progress=self._on_progress,
        )


def _escape(path: Path) -> str:
    """Return a path for an option of QEMU, where a comma ends a value."""
    return str(path.absolute()).replace(",", ",,")


def _all_listening(paths: Sequence[Path]) -> bool:
    """Tell without connecting, which would take the one place that a client has."""
    listening = set()
    for line in Path("/proc/net/unix").read_text("utf-8").splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and int(words[3], 16) & _LISTENING:
            listening.add(words[7])
    return all(str(path.absolute()) in listening for path in paths)


def _drain(console: socket.socket) -> None:
    """Read and drop, so that the guest never waits for a reader; the log has everything."""
    try:
        while console.recv(1 << 16):
            pass
    except OSError:
        pass  # closed by us
