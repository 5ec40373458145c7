"""`qemu-dump-guest-memory`: dump a guest by its monitor, or by gdb at its gdbstub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qemu_dump_ext.cli import run_guarded, wants_json
from qemu_dump_ext.cli._description import add_description_argument
from qemu_dump_ext.connections.silent import open_guest_or_memory
from qemu_dump_ext.connections.target import target_of_arguments
from qemu_dump_ext.engine.dump import dump
from qemu_dump_ext.engine.report import DumpReport
from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.memory_sources.process import SOURCE as PROCESS
from qemu_dump_ext.options.dump_options import (
    RESUME,
    STAY_STOPPED,
    add_dump_arguments,
    add_file_arguments,
    names_registers,
    parse_dump_arguments,
    read_registers,
    request_of,
)
from qemu_dump_ext.options.parsers import OneLineParser, epilog_of
from qemu_dump_ext.printable import printable
from qemu_dump_ext.progress import OneLine, ProgressMeter
from qemu_dump_ext.sinks import Sink, open_sink, target_forms
from qemu_dump_ext.standard_error import is_terminal, tell

PROGRAM = "qemu-dump-guest-memory"
STANDARD_OUTPUT = 1
_STATUSES = (
    "0 complete; 2 impossible request; 3 the guest cannot be reached; 4 the dump cannot be"
    " written; 6 written, but a register is missing; 130 interrupted"
)
_EXAMPLES = (
    "--qmp /run/vm.qmp vm.elf",
    "--qmp /run/vm.qmp -z zstd -R vm.kdump",
    "--gdb localhost:1234 -z vm.kdump",
    "--qmp /run/vm.qmp -z - | ssh host 'cat >vm.kdump'",
)


def dump_parser(program: str = PROGRAM) -> OneLineParser:
    """Return the parser of the command line."""
    parser = OneLineParser(
        prog=program,
        description="Dump the memory and the registers of a QEMU guest, from outside QEMU.",
        epilog=epilog_of(program, _EXAMPLES, _STATUSES),
    )
    add_dump_arguments(parser)
    parser.add_argument(
        "--gdb",
        metavar="ADDRESS",
        help="drive a gdb at this gdbstub (unix path or HOST:PORT); with --qmp, the run state"
        " before gdb stopped the guest is known",
    )
    add_description_argument(parser)
    afterwards = parser.add_mutually_exclusive_group()
    afterwards.add_argument(
        "--stay-stopped",
        dest="afterwards",
        action="store_const",
        const=STAY_STOPPED,
        help="with --gdb: leave the guest stopped, whatever it did before",
    )
    afterwards.add_argument(
        "--resume",
        dest="afterwards",
        action="store_const",
        const=RESUME,
        help="with --gdb: let the guest run afterwards, also where it was stopped before",
    )
    add_file_arguments(parser, f"{target_forms()}, or - for standard output")
    return parser


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Entry point; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    return run_guarded(
        program,
        lambda: _run(words, program),
        interrupted="no partial dump was left behind",
        as_json=wants_json(words) and "-" not in words,  # there goes the dump
    )


def _run(words: Sequence[str], program: str) -> int:
    arguments = parse_dump_arguments(dump_parser(program), words)
    check_outputs(arguments)
    if arguments.gdb is not None and arguments.description is not None:
        raise RequestError(
            "--description is for a guest of which nobody can be asked, not for --gdb"
        )
    if arguments.gdb is not None:
        from qemu_dump_ext.cli.gdb_driver import dump_through_gdb  # noqa: PLC0415 - for few

        return dump_through_gdb(arguments)
    if arguments.afterwards is not None:
        raise RequestError(f"--{arguments.afterwards} goes with --gdb")
    target = target_of_arguments(arguments)
    if not target.is_told:
        raise RequestError("which guest?", hint="--guest NAME, --qmp SOCKET or --gdb ADDRESS")
    # What can be refused is refused before the guest is asked.
    request = None if names_registers(arguments) else request_of(arguments)
    sink = open_sink(arguments.file, force=arguments.force, standard_output=STANDARD_OUTPUT)
    with (
        open_guest_or_memory(
            target,
            memory_alone=arguments.memory == PROCESS.name,
            description=arguments.description,
        ) as access,
        sink,
        shown_progress(arguments.progress) as progress,
    ):
        if request is None:
            read_registers(arguments, access.monitor)
            request = request_of(arguments)
        report = dump(request, access, sink, memory=arguments.memory, progress=progress)
    return show_report(arguments, report, sink)


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse what would mix a dump with its report.

    Raises:
        RequestError: Both are to go to standard output.
    """
    if arguments.file == "-" and arguments.json:
        raise RequestError("--json and the dump cannot both go to standard output")


def show_report(arguments: argparse.Namespace, report: DumpReport, sink: Sink) -> int:
    """Show what was done, and what opens it; returns the exit status."""
    if arguments.json:
        _print(report.to_json())
    else:
        lines = (*report.lines(verbose=arguments.verbose), *sink.remarks, *report.opening_line())
        tell(printable("\n".join(lines)))
    return report.exit_status


@contextmanager
def shown_progress(choice: str) -> Iterator[ProgressMeter]:
    """Show progress until the end of the block, however it ends; nothing of it is left."""
    if choice == "json":
        yield ProgressMeter(tell, as_json=True)
        return
    if choice == "never" or (choice == "auto" and not is_terminal()):
        yield ProgressMeter(None)
        return
    line = OneLine(lambda text: tell(text, end=""))
    try:
        yield ProgressMeter(line.show)
    finally:
        line.clear()


def _print(text: str) -> None:
    # The dump is complete, whoever hears of it.
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = None
