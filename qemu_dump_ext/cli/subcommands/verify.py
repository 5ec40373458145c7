"""`qemu-dump verify`: find damage in a dump.

With `--json` one object is printed: `file`, `format`, `ok` (true or false), `memory_bytes` looked
at, `pages` (`zero`, `raw`, `packed`; null for ELF), `problem_count`, `problems` (the first 20,
one line each) and `remarks` (odd, but harmless).
"""

from __future__ import annotations

import argparse
import json
import os
import time

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli._source_arguments import ANY_DUMP, add_source_arguments, open_source
from qemu_dump_ext.dump_readers import VerifyReport
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import EXIT_SUCCESS, CorruptDumpError
from qemu_dump_ext.printable import printable
from qemu_dump_ext.standard_error import is_terminal, tell

_PROGRESS_INTERVAL_S = 0.2


class _ProgressLine:
    """A line on a terminal's stderr that is written over and over; nothing elsewhere."""

    def __init__(self) -> None:
        self._shown = is_terminal()
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        if self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + _PROGRESS_INTERVAL_S
            text = f"\r{100 * done // max(total, 1):3} % of {total >> 20} MiB"
            tell(text, end="")

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            tell("\r\x1b[K", end="")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help=ANY_DUMP)
    add_source_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    progress = _ProgressLine()
    with open_source(arguments.file, arguments) as dump:
        try:
            report = verify_dump(dump, workers=os.cpu_count() or 1, progress=progress)
        finally:
            progress.clear()
        if arguments.json:
            print(json.dumps(_as_json(arguments.file, dump.format, report), indent=2))
        else:
            _print_words(dump.format, report)
    return CorruptDumpError.exit_status if report.problem_count else EXIT_SUCCESS


def _as_json(file: str, dump_format: str, report: VerifyReport) -> dict[str, object]:
    pages = {"zero": report.zero_pages, "raw": report.raw_pages, "packed": report.packed_pages}
    return {
        "file": file,
        "format": dump_format,
        "ok": not report.problem_count,
        "memory_bytes": report.memory_bytes,
        "pages": pages if report.counts_pages else None,
        "problem_count": report.problem_count,
        "problems": report.problems,
        "remarks": report.remarks,
    }


def _print_words(dump_format: str, report: VerifyReport) -> None:
    for problem in report.problems:
        print(printable(f"problem: {problem}"))
    if rest := report.problem_count - len(report.problems):
        print(f"problem: {rest} more")
    for remark in report.remarks:
        print(printable(f"remark: {remark}"))
    damaged = report.problem_count
    pages = report.zero_pages + report.raw_pages + report.packed_pages
    counts = (
        f"{pages} {'good ' if damaged else ''}pages ({report.packed_pages} packed,"
        f" {report.raw_pages} raw, {report.zero_pages} zero), "
        if report.counts_pages
        else ""
    )
    verdict = f"damaged, {damaged} problem{'s' * (damaged > 1)}" if damaged else "ok"
    mib = report.memory_bytes / (1 << 20)
    print(printable(f"{verdict}: {counts}{mib:.1f} MiB of guest memory, {dump_format}"))


COMMAND = Subcommand(
    name="verify",
    help="read a whole dump and find damage in it",
    add_arguments=_add_arguments,
    run=_run,
    examples=("vm.kdump", "--json vm.kdump"),
)
