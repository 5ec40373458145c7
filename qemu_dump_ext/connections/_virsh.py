"""A virsh that is asked again and again, as by somebody who types.

It is there wherever libvirt is used, and one that is kept answers in some 4 ms; none of libvirt's
libraries has to fit to this Python.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import subprocess
import threading
import time

from qemu_dump_ext.errors import ConnectError, MonitorAnswerError, SourceError
from qemu_dump_ext.host_limits import refused_as
from qemu_dump_ext.interrupts import uninterrupted

_PROGRAM = "virsh"
_SECONDS = 120.0
_STARTS_SECONDS = 30.0
_BLOCK = 1 << 16
_ECHOED = 40
_ANSWER_MAX = 64 << 20
_PROMPT = re.compile(r"^(?:virsh [#>] )+")
_ERROR = "error: "
# What virsh says when the daemon was lost, or is there again, is no answer to a command.
_OF_THE_CONNECTION = re.compile(r"error: (?:Disconnected from|Reconnected to) ")
_ENVIRONMENT = {
    "LC_ALL": "C",
    # Without one, as of a service, or by a dumb one, it echoes what was typed from the middle on.
    "TERM": "xterm",
    # It keeps what it was asked as the history of its user, which is none of ours; where it is
    # kept must be no other place for a daemon of the session that virsh starts.
    "XDG_CACHE_HOME": os.devnull,
    "LIBVIRT_AUTOSTART": "0",
}


def quoted(word: str) -> str:
    """Return a word as virsh takes it for one."""
    return "'" + word.replace("'", "'\\''") + "'"


def ask_once(uri: str | None, *words: str, descriptor: int | None = None) -> str:
    """Return what a virsh of its own prints; a daemon of the session is started by it.

    Args:
        uri: Of the connection; None: virsh's own choice.
        words: The command.
        descriptor: It inherits this one, under the same number; None: none.

    Raises:
        ConnectError: There is no virsh, no libvirt that answers, or it refuses; in its words.
    """
    argv = [virsh_program(), "-q", *(() if uri is None else ("-c", uri)), *words]
    with refused_as(SourceError, "start virsh"):
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_STARTS_SECONDS,
                check=False,
                env=os.environ | {"LC_ALL": "C"},
                start_new_session=True,
                pass_fds=() if descriptor is None else (descriptor,),
            )
        except subprocess.TimeoutExpired as error:
            raise ConnectError(
                f"libvirt does not answer in {_STARTS_SECONDS:.0f} s: virsh {' '.join(words)}"
            ) from error
    if done.returncode:
        raise ConnectError(
            f"libvirt: {_refusal(done.stderr.decode('utf-8', 'replace').splitlines())}"
        )
    return done.stdout.decode("utf-8", "replace").strip()


def virsh_program() -> str:
    """Return the path of virsh.

    Raises:
        ConnectError: It is not installed.
    """
    program = shutil.which(_PROGRAM)
    if program is None:
        raise ConnectError("there is no virsh on this machine", hint="install libvirt-clients")
    return program


def _refusal(lines: list[str]) -> str:
    # The last one says why: `failed to connect to the hypervisor` comes before it.
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    told = [line for line in errors if not line.startswith("failed to connect to the hyper")]
    return (told or errors or ["virsh says nothing"])[-1][:500]


class _EndedError(SourceError):
    pass


class Virsh:
    """The child; started when it is asked, and again when it has ended.

    May be asked from any thread, one at a time.
    """

    def __init__(self, uri: str) -> None:
        """Prepare.

        Args:
            uri: Of the connection.
        """
        self._uri = uri
        self._asking = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._closed = False

    def ask(self, command: str, *, again: bool = False, seconds: float = _SECONDS) -> str:
        """Return what a command prints.

        Args:
            command: One line, as it would be typed.
            again: It may be asked twice, where virsh ends in the middle.
            seconds: How long it may take.

        Raises:
            MonitorAnswerError: libvirt refuses it; in its words.
            SourceError: virsh has ended, or does not answer.
        """
        with self._asking:
            name = command.partition(" ")[0]
            try:
                lines = self._exchange(command, name, seconds)
            except _EndedError:
                if not again:
                    raise
                lines = self._exchange(command, name, seconds)
        errors = [
            line for line in lines if line.startswith(_ERROR) and not _OF_THE_CONNECTION.match(line)
        ]
        if errors:
            raise MonitorAnswerError(name, f"libvirt: {_refusal(errors)}")
        return "\n".join(lines)

    def close(self) -> None:
        """End it; harmless when repeated."""
        self._closed = True
        self._end()

    def _exchange(self, command: str, name: str, seconds: float) -> list[str]:
        # An answer that was given up before comes before this one, with its mark.
        before, self._number = self._mark(), self._number + 1
        typed = f"echo {self._mark()}"
        child = self._running()
        try:
            with uninterrupted():
                if child.stdin is not None:
                    child.stdin.write(f"{command}\n{typed}\n".encode())
            text = self._read_to(child, self._mark(), name, seconds)
        except BrokenPipeError as error:
            raise self._ended(name) from error
        # What was typed is echoed, broken where a terminal would break it.
        echoes = tuple(word[:_ECHOED] for word in (command, typed))
        lines = (_PROMPT.sub("", line) for line in text.rpartition(before)[2].split("\n"))
        return [line for line in lines if line and not line.startswith(echoes)]

    def _mark(self) -> str:
        return f"qemu-dump-{os.getpid()}-{self._number}."

    def _running(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise SourceError("the connection to libvirt was closed")
        if self._child is None or self._child.poll() is not None:
            self._end()
            with uninterrupted(), refused_as(SourceError, "start virsh"):
                self._child = subprocess.Popen(
                    [virsh_program(), "-q", "-c", self._uri],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    bufsize=0,
                    env=os.environ | _ENVIRONMENT,
                    start_new_session=True,  # Ctrl-C is ours
                )
        return self._child

    def _read_to(self, child: subprocess.Popen[bytes], mark: str, name: str, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        end = re.compile(rb"(?:\A|\n)(?:\S*virsh [#>] )*" + re.escape(mark.encode()))
        data = bytearray()
        stream = child.stdout
        while stream is not None and (found := end.search(data)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise SourceError(f"libvirt does not answer {name} in {seconds:.0f} s")
            if not select.select([stream], [], [], left)[0]:
                continue
            piece = os.read(stream.fileno(), _BLOCK)
            if not piece:
                raise self._ended(name)
            data += piece
            if len(data) > _ANSWER_MAX:
                self._end()
                raise SourceError(f"libvirt's answer to {name} is longer than {_ANSWER_MAX} bytes")
        return bytes(data[: found.start()] if found else data).decode("utf-8", "replace")

    def _ended(self, name: str) -> SourceError:
        self._end()
        return _EndedError(f"virsh has ended in the middle of {name}: was it killed?")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with uninterrupted():
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
