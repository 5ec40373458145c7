"""`qemu-dump open`: a dump, or a crash of the collector's store, in crash, drgn or gdb."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli._start_reader import start_reader
from qemu_dump_ext.crash_collector.config.places import default_configuration
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.dump_readers.kdump import KdumpFile
from qemu_dump_ext.engine.opening import (
    READERS,
    VMLINUX_VARIABLE,
    Kernel,
    fetch_vmlinux,
    find_vmlinux,
    is_file,
    is_for_crash_alone,
    opening,
    symbols_command,
)
from qemu_dump_ext.engine.stored_guest import StoredGuest
from qemu_dump_ext.errors import EXIT_SUCCESS, DumpError, RequestError
from qemu_dump_ext.printable import printable
from qemu_dump_ext.standard_error import tell
from qemu_dump_ext.third_party import require_extra


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE|CRASH",
        help="a dump; or a crash of the collector's: its ID or the beginning of it, 'latest', or a"
        " guest's name",
    )
    parser.add_argument(
        "--reader",
        choices=READERS,
        help="which reader opens it; default: crash, where there is a vmlinux, or else drgn",
    )
    parser.add_argument(
        "--vmlinux",
        metavar="FILE",
        type=Path,
        help=f"the kernel's symbols; default: ${VMLINUX_VARIABLE}, or what is found by the build ID"
        " of the kernel: in /usr/lib/debug, or by debuginfod where $DEBUGINFOD_URLS is set",
    )
    parser.add_argument(
        "--print", action="store_true", help="print the command instead of starting it"
    )


def _run(arguments: argparse.Namespace) -> int:
    path = Path(arguments.file)
    if _may_be_crash(arguments.file):
        return _open_crash(arguments)
    with open_dump(path) as dump:
        facts, dump_format = dump.vmcoreinfo_facts, dump.format
        zeros_left_out = isinstance(dump, KdumpFile) and dump.may_leave_zeros_out
        names_kernel = dump.utsname.names_linux
        try:
            target = StoredGuest(dump).architecture.name
        except DumpError:
            target = None
    kernel = Kernel(facts.get("OSRELEASE"), facts.get("BUILD-ID"))
    vmlinux = arguments.vmlinux
    if vmlinux is not None and not is_file(vmlinux):
        raise RequestError(f"--vmlinux: there is no file {vmlinux}")
    if vmlinux is None and kernel.release is not None:
        vmlinux = find_vmlinux(kernel) or fetch_vmlinux(kernel)
    found = opening(
        path,
        dump_format,
        kernel,
        target=target,
        reader=arguments.reader,
        vmlinux=vmlinux,
        zeros_left_out=zeros_left_out,
        names_kernel=names_kernel,
    )
    if found is None:
        raise RequestError(
            f"nothing on this host opens {path}",
            hint=f"'qemu-dump convert {shlex.quote(str(path))} vm.elf' makes what readers open"
            if is_for_crash_alone(dump_format, names_kernel=names_kernel)
            else _advice(kernel),
        )
    if arguments.print:
        print(printable(found.line()))
        return EXIT_SUCCESS
    if vmlinux is None and kernel.release is not None:
        tell(printable(f"no vmlinux of {kernel.release} is on this host: {_advice(kernel)}"))
    return start_reader(found)


def _advice(kernel: Kernel) -> str:
    command = symbols_command(kernel)
    return command or "--vmlinux FILE, or pip install 'qemu_dump_ext[drgn]'"


def _may_be_crash(word: str) -> bool:
    """Tell whether a word is no file, and a crash collector may have a crash of that name.

    Raises:
        RequestError: It is no path either, and there is no collector.
    """
    is_there = os.path.lexists(word)
    if Path(word).is_absolute() or (is_there and not Path(word).is_dir()):
        return False
    if is_file(default_configuration()):
        return True
    if is_there or os.sep in word:
        return False
    raise RequestError(
        f"there is no file {word or repr('')}, and no crash collector that could have a crash of"
        f" that name: {default_configuration()} is not there"
    )


def _open_crash(arguments: argparse.Namespace) -> int:
    """Leave it to the collector's own command, which knows the store."""
    require_extra("collector", "a crash of the collector's store")
    from qemu_dump_ext.cli.crash_collector_command import main  # noqa: PLC0415 - needs pydantic

    words = ["open", arguments.file]
    words += ["--reader", arguments.reader] if arguments.reader else []
    words += ["--vmlinux", str(arguments.vmlinux)] if arguments.vmlinux else []
    words += ["--print"] if arguments.print else []
    return main(words, "qemu-dump collect")


COMMAND = Subcommand(
    "open",
    "open a dump in crash, drgn or gdb, with the symbols of its kernel",
    _add_arguments,
    _run,
    examples=("vm.kdump", "vm.kdump --reader drgn", "latest", "web1"),
)
