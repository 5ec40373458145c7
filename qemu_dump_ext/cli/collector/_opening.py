"""How a crash of the store is opened, with the symbols that the configuration names."""

from __future__ import annotations

import argparse
from pathlib import Path

from qemu_dump_ext.cli.collector._arguments import configuration_of
from qemu_dump_ext.crash_collector.collect.collection import kernel_file
from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.crash_collector.watch.guests import Guest, find_guests
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.opening import Kernel, Opening, opening
from qemu_dump_ext.errors import DumpError, RequestError


def opening_of(
    arguments: argparse.Namespace,
    store: CrashStore,
    record: CrashRecord,
    *,
    reader: str | None = None,
    vmlinux: Path | None = None,
) -> Opening:
    """Return how the dump of a crash is opened.

    Args:
        arguments: Of the command line, with the configuration.
        store: Where it is.
        record: The crash.
        reader: `crash`, `drgn` or `gdb`; None: the first that can.
        vmlinux: The kernel's symbols; None: the configuration's, or looked for.

    Raises:
        RequestError: It has no dump, or nothing here opens it.
        CorruptDumpError: The dump is damaged.
    """
    if record.dump.file is None:
        raise RequestError(f"{record.id} has no dump: {record.dump.reason}")
    dump = store.directory(record.id) / record.dump.file
    kernel = kernel_of(dump)
    vmlinux = vmlinux or _configured_vmlinux(arguments, record, kernel.release)
    target = record.qemu.target if record.qemu.target != "unknown" else None
    found = opening(dump, record.dump.format, kernel, target=target, reader=reader, vmlinux=vmlinux)
    if found is None:
        raise RequestError(
            f"nothing on this host opens {dump}",
            hint="pip install 'qemu_dump_ext[drgn]', or crash with the kernel's vmlinux",
        )
    return found


def kernel_of(dump: Path) -> Kernel:
    """Return what a dump tells of its kernel.

    Raises:
        CorruptDumpError: It is damaged, or is none.
    """
    with open_dump(dump) as opened:
        facts = opened.vmcoreinfo_facts
    return Kernel(facts.get("OSRELEASE"), facts.get("BUILD-ID"))


def _configured_vmlinux(
    arguments: argparse.Namespace, record: CrashRecord, release: str | None
) -> Path | None:
    if arguments.store is not None:
        return None
    try:
        configuration = configuration_of(arguments)
    except DumpError:
        return None
    watched = find_guests(configuration).get(record.guest)
    settings = [watched.settings] if watched else [*configuration.guests, configuration.defaults]
    for setting in settings:
        guest = watched or Guest(record.guest, "", setting)
        if found := kernel_file(guest, setting.symbols.vmlinux, release):
            return found
    return None
