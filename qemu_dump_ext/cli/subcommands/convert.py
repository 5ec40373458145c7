"""`qemu-dump convert`: make of a dump that exists the dump that a reader wants."""

from __future__ import annotations

import argparse
from functools import partial

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli._source_arguments import (
    ANY_DUMP,
    add_source_arguments,
    add_target_argument,
    open_source,
)
from qemu_dump_ext.cli.dump_command import (
    STANDARD_OUTPUT,
    check_outputs,
    show_report,
    shown_progress,
)
from qemu_dump_ext.engine.convert import SEARCH_SECONDS, convert
from qemu_dump_ext.options.dump_options import (
    add_convert_arguments,
    positive_seconds,
    request_of,
    with_explicit_codec,
)
from qemu_dump_ext.sinks import open_sink, target_forms

_STATUSES = (
    "0 complete; 2 impossible request; 3 nothing in IN tells what is asked for; 4 the dump cannot"
    " be written; 5 IN is damaged beyond use; 6 written, but something that IN is to have is not in"
    " it; 130 interrupted"
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help=ANY_DUMP)
    parser.add_argument("file", metavar="FILE", help=f"{target_forms()}, or - for standard output")
    add_source_arguments(parser)
    parser.add_argument(
        "--keep",
        action="store_true",
        help="mend nothing: notes, names and addresses are as the earlier dump has them",
    )
    add_target_argument(parser)
    parser.add_argument(
        "--search-seconds",
        type=positive_seconds,
        default=SEARCH_SECONDS,
        metavar="N",
        help="how long to search memory for the kernel's VMCOREINFO where the dump has none;"
        f" default: {SEARCH_SECONDS:g}",
    )
    add_convert_arguments(parser)


def _run(arguments: argparse.Namespace) -> int:
    check_outputs(arguments)
    request = request_of(arguments)
    sink = open_sink(arguments.file, force=arguments.force, standard_output=STANDARD_OUTPUT)
    with (
        open_source(arguments.source, arguments) as dump,
        sink,
        shown_progress(arguments.progress) as progress,
    ):
        report = convert(
            request,
            dump,
            sink,
            progress=progress,
            target=arguments.target,
            keep=arguments.keep,
            search_seconds=arguments.search_seconds,
        )
    return show_report(arguments, report, sink)


COMMAND = Subcommand(
    name="convert",
    help="make another dump of a dump: in another format, with less in it, mended",
    add_arguments=_add_arguments,
    run=_run,
    spell_out=partial(with_explicit_codec, files=2),
    examples=(
        "old.elf new.kdump -z zstd -R",
        "vm.lime vm.elf",
        "vm.elf small.kdump --dump-level 31",
    ),
    statuses=_STATUSES,
)
