"""`qemu-crash-collector show`: all that is known about one crash."""

from __future__ import annotations

import argparse
import json

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_json, add_store, store_of
from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.errors import EXIT_SUCCESS
from qemu_dump_ext.printable import printable


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_json(parser)
    parser.add_argument("crash", metavar="ID", help="the ID of the crash, as 'list' shows it")


def _run(arguments: argparse.Namespace) -> int:
    store = store_of(arguments)
    record = store.record(arguments.crash)
    if arguments.json:
        print(json.dumps(record.as_dict(), indent=2))
    else:
        lines = [*_lines(record), f"directory: {store.directory(record.id)}"]
        print("\n".join(printable(line, keep="\t") for line in lines))
    return EXIT_SUCCESS


def _lines(record: CrashRecord) -> list[str]:
    dump, qemu = record.dump, record.qemu
    state = "complete" if dump.complete else "incomplete"
    verified = ", ".join(dump.verified_by) or "nobody"
    lines = [
        f"guest: {record.guest}",
        *(f"{name}: {value}" for name, value in record.labels.items()),
        f"time: {record.time}",
        f"cause: {record.cause.kind}: {record.cause.detail}",
        f"signature: {record.signature.id}, seen {record.occurrence} times then",
        f"message: {record.signature.message}",
        *(f"  {name}" for name in record.signature.frames),
    ]
    if dump.file is not None:
        lines.append(
            f"dump: {dump.file}, {dump.format}, {dump.bytes} bytes, {state}, verified by {verified}"
        )
        lines += [f"left out: {what}" for what in dump.left_out]
    if dump.reason is not None:
        lines.append(f"{'dump' if dump.file else 'no dump'}: {dump.reason}")
    lines += [
        f"QEMU: {qemu.version}, {qemu.target}, process {qemu.pid or 'unknown'}",
        f"stopped by us for {record.guest_stopped_seconds:.3f} s; then: {record.after_action}",
        *(f"remark: {remark}" for remark in record.remarks),
    ]
    if record.uploaded is not None:
        lines.append(f"uploaded: {record.uploaded.time} {record.uploaded.url}")
    return [*lines, "held: limits never remove it"] if record.held else lines


COMMAND = Subcommand("show", "show one crash", _add_arguments, _run)
