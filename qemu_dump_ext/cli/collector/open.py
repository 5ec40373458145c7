"""`qemu-crash-collector open`: the dump of a crash, in crash or drgn."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_store, configuration_of, store_of
from qemu_dump_ext.crash_collector.collect.collection import kernel_file
from qemu_dump_ext.crash_collector.collect.readers import reader_command
from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.crash_collector.watch.guests import Guest, GuestFinder
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.third_party import require_extra


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("crash", metavar="ID", help="the ID of the crash, as 'list' shows it")
    parser.add_argument(
        "--reader",
        choices=("crash", "drgn"),
        help="which reader opens it; default: crash, where there is a vmlinux",
    )
    parser.add_argument(
        "--vmlinux",
        metavar="FILE",
        type=Path,
        help="the kernel's vmlinux with DWARF; default: the configuration's",
    )


def _run(arguments: argparse.Namespace) -> int:
    store = store_of(arguments)
    record = store.record(arguments.crash)
    if record.dump.file is None:
        raise RequestError(f"{record.id} has no dump: {record.dump.reason}")
    dump = store.directory(record.id) / record.dump.file
    vmlinux = arguments.vmlinux or _configured_vmlinux(arguments, record, dump)
    reader = arguments.reader or ("crash" if vmlinux and shutil.which("crash") else "drgn")
    if reader == "crash" and vmlinux is None:
        raise RequestError(
            "crash needs the kernel's vmlinux", hint="--vmlinux FILE, or `symbols: {vmlinux: ...}`"
        )
    if reader == "drgn":
        require_extra("drgn", "--reader drgn")
    argv = reader_command(reader, dump, vmlinux)
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - the reader is what the user wants to be in
    except OSError as error:
        raise RequestError(f"cannot start {argv[0]}: {error.strerror}") from error


def _configured_vmlinux(
    arguments: argparse.Namespace, record: CrashRecord, dump: Path
) -> Path | None:
    if arguments.store is not None:
        return None
    configuration = configuration_of(arguments)
    watched = GuestFinder().find(configuration).get(record.guest)
    with open_dump(dump) as opened:
        release = opened.vmcoreinfo_facts.get("OSRELEASE")
    settings = [watched.settings] if watched else [*configuration.guests, configuration.defaults]
    for setting in settings:
        guest = watched or Guest(record.guest, "", setting)
        if found := kernel_file(guest, setting.symbols.vmlinux, release):
            return found
    return None


COMMAND = Subcommand("open", "open the dump of a crash in crash or drgn", _add_arguments, _run)
