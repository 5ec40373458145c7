"""Where a dump goes: one file for each kind of target."""

from __future__ import annotations

import stat
from pathlib import Path

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.sinks._sink import Sink, mode_of
from qemu_dump_ext.sinks.command import CommandSink
from qemu_dump_ext.sinks.descriptor import DescriptorSink
from qemu_dump_ext.sinks.device import DeviceSink
from qemu_dump_ext.sinks.file import FileSink


def open_sink(target: str, *, force: bool, standard_output: int | None) -> Sink:
    """Return the sink for what the user named; entering it opens it.

    Args:
        target: A path, `file:PATH`, `fd:N`, `-` or `|command`.
        force: Replace an existing file.
        standard_output: Descriptor behind `-`; None where there is none to give away.

    Raises:
        RequestError: `target` is malformed, or exists and `force` is false.
        DumpWriteError: It cannot be created.
    """
    if target.startswith("|"):
        if not target[1:].strip():
            raise RequestError("no command behind |", hint="as in '|zstd > out.zst'")
        return CommandSink(target[1:])
    if target == "-":
        if standard_output is None:
            raise RequestError("- is not possible here", hint="name a file, fd:N or |command")
        return DescriptorSink("-", standard_output)
    if target.startswith("fd:"):
        number = target.removeprefix("fd:")
        if not (number.isascii() and number.isdecimal()):
            raise RequestError(f"{target}: fd: wants the number of an open descriptor, as in fd:3")
        return DescriptorSink(target, int(number))
    path = target.removeprefix("file:")
    if not path:
        raise RequestError("the name of the dump is empty")
    return _path_sink(path, force=force)


def _path_sink(path: str, *, force: bool) -> Sink:
    try:
        # A symbolic link stays one: its target is what is replaced.
        resolved = Path(path).expanduser().resolve()
    except RuntimeError as error:  # no such user's home, or a loop of links
        raise RequestError(f"{path} names no file: {error}") from error
    mode = mode_of(resolved)
    if mode is not None and (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        return DeviceSink(resolved)
    if mode is not None and (stat.S_ISBLK(mode) or stat.S_ISSOCK(mode)):
        raise RequestError(f"{path} is a block device or a socket", hint="name a file or fd:N")
    return FileSink(resolved, force=force)
