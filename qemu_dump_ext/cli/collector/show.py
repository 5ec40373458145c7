"""`qemu-crash-collector show`: all that is known about one crash, what it says of itself first."""

from __future__ import annotations

import argparse
import json

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import CRASH_HELP, add_json, add_store, store_of
from qemu_dump_ext.cli.collector._opening import opening_of
from qemu_dump_ext.cli.collector._presentation import (
    age_text,
    record_with_state,
    state_lines,
)
from qemu_dump_ext.crash_collector.collect.signature import report_of_directory
from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.crash_collector.store.lookup import find_crash
from qemu_dump_ext.crash_collector.store.states import SignatureStates
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import EXIT_SUCCESS, DumpError
from qemu_dump_ext.printable import printable


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    add_json(parser)
    parser.add_argument("crash", metavar="ID", help=CRASH_HELP)


def _run(arguments: argparse.Namespace) -> int:
    store = store_of(arguments)
    record = store.record(find_crash(store, arguments.crash))
    states = store.states()
    if arguments.json:
        print(json.dumps(record_with_state(record, states), indent=2))
        return EXIT_SUCCESS
    lines = [
        *(report_of_directory(store.directory(record.id)) or _message(record)),
        "",
        f"kernel: {record.kernel or 'unknown'}",
        *_opening(arguments, store, record),
        "",
        *_facts(record, states),
        f"directory: {store.directory(record.id)}",
    ]
    print("\n".join(printable(line, keep="\t") for line in lines))
    return EXIT_SUCCESS


def _message(record: CrashRecord) -> list[str]:
    signature = record.signature
    return [signature.message, *(f"  {name}" for name in signature.frames)]


def _opening(arguments: argparse.Namespace, store: CrashStore, record: CrashRecord) -> list[str]:
    if record.dump.file is None:
        return []
    try:
        return [f"open it: {opening_of(arguments, store, record).line()}"]
    except DumpError as error:
        return [f"open it: {error}"]


def _facts(record: CrashRecord, states: SignatureStates) -> list[str]:
    dump, qemu = record.dump, record.qemu
    state = "complete" if dump.complete else "incomplete"
    verified = ", ".join(dump.verified_by) or "nobody"
    lines = [
        f"id: {record.id}",
        f"guest: {record.guest}",
        *(f"{name}: {value}" for name, value in record.labels.items()),
        f"time: {record.time} ({age_text(record.moment)} ago)",
        f"cause: {record.cause.kind}: {record.cause.detail}",
        f"signature: {record.signature.id}, number {record.occurrence} of it",
        f"message: {record.signature.message}",
        *(f"  {name}" for name in record.signature.frames),
        *state_lines(record.signature.id, states),
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


COMMAND = Subcommand(
    "show",
    "show one crash",
    _add_arguments,
    _run,
    examples=("latest", "web1", "--json 20260131T12"),
)
