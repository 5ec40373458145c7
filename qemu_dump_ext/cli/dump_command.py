"""`qemu-dump-guest-memory`: dump a guest by its QMP socket, or by gdb at its gdbstub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qemu_dump_ext.cli import run_guarded
from qemu_dump_ext.cli.gdb_driver import dump_through_gdb
from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.guest.access import GuestAccess
from qemu_dump_ext.options.dump_options import (
    OneLineParser,
    add_dump_arguments,
    add_file_arguments,
    names_registers,
    parse_dump_arguments,
    read_registers,
    request_of,
)
from qemu_dump_ext.printable import printable
from qemu_dump_ext.progress import ProgressMeter
from qemu_dump_ext.qemu.qmp import connect_qmp
from qemu_dump_ext.sinks import Sink, open_sink, target_forms
from qemu_dump_ext.standard_error import is_terminal, tell

PROGRAM = "qemu-dump-guest-memory"
STANDARD_OUTPUT = 1


def dump_parser() -> OneLineParser:
    """Return the parser of the command line."""
    parser = OneLineParser(
        prog=PROGRAM,
        description="Dump the memory and the registers of a QEMU guest, from outside QEMU.",
        epilog="Exit status: 0 complete; 2 impossible request; 3 the guest cannot be reached;"
        " 4 the dump cannot be written; 6 written, but a register is missing; 130 interrupted.",
    )
    add_dump_arguments(parser)
    parser.add_argument(
        "--gdb",
        metavar="ADDRESS",
        help="drive a gdb at this gdbstub (unix path or HOST:PORT); with --qmp, the run state"
        " before gdb stopped the guest is known",
    )
    add_file_arguments(parser, f"{target_forms()}, or - for standard output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_guarded(
        PROGRAM,
        lambda: _run(sys.argv[1:] if argv is None else argv),
        interrupted="no partial dump was left behind",
    )


def _run(words: Sequence[str]) -> int:
    arguments = parse_dump_arguments(dump_parser(), words)
    check_outputs(arguments)
    if arguments.gdb is not None:
        return dump_through_gdb(arguments)
    if arguments.qmp is None:
        raise RequestError("which guest?", hint="--qmp SOCKET or --gdb ADDRESS")
    # What can be refused is refused before the guest is asked.
    request = None if names_registers(arguments) else request_of(arguments)
    progress = progress_of(arguments)
    sink = open_sink(arguments.file, force=arguments.force, standard_output=STANDARD_OUTPUT)
    with connect_qmp(arguments.qmp) as monitor, sink:
        if request is None:
            read_registers(arguments, monitor)
            request = request_of(arguments)
        access = GuestAccess.by_qmp(monitor)
        report = dump(request, access, sink, memory=arguments.memory, progress=progress)
    return show_report(arguments, report, sink)


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse what would mix a dump with its report.

    Raises:
        RequestError: Both are to go to standard output.
    """
    if arguments.file == "-" and arguments.json:
        raise RequestError("--json and the dump cannot both go to standard output")


def progress_of(arguments: argparse.Namespace) -> ProgressMeter:
    """Return the meter that --progress asks for."""
    return ProgressMeter(_show_line if _is_watched(arguments) else None)


def _is_watched(arguments: argparse.Namespace) -> bool:
    return is_terminal() if arguments.progress == "auto" else arguments.progress == "always"


def show_report(arguments: argparse.Namespace, report: DumpReport, sink: Sink) -> int:
    """Show what was done, behind the last line of progress; returns the exit status."""
    if _is_watched(arguments):
        _show_line("")
    if arguments.json:
        _print(report.to_json())
    else:
        tell(printable("\n".join((*report.lines(), *sink.remarks))))
    return report.exit_status


def _print(text: str) -> None:
    # The dump is complete, whoever hears of it.
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = None


def _show_line(line: str) -> None:
    tell(f"\r{line:<70}", end="\r")
