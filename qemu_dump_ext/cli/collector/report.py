"""`qemu-crash-collector report`: the crashes of a store, or of many, as pages and a feed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_store, configuration_of
from qemu_dump_ext.crash_collector.outlets.crash_source import (
    CrashSource,
    RemoteSource,
    StoreSource,
)
from qemu_dump_ext.crash_collector.outlets.report import (
    REPORT_FILE,
    write_report,
    write_report_of,
)
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import EXIT_SUCCESS, DumpError, RequestError
from qemu_dump_ext.printable import printable

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument(
        "--from",
        dest="sources",
        metavar="DIR|URL",
        action="append",
        default=[],
        help="instead of the store: one of several, or where hosts upload to; may be repeated. A"
        " URL is one of fsspec's, with the options of `upload` in the configuration",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help=f"where to; default: `report` of the configuration, or {REPORT_FILE} in the store",
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.sources:
        if arguments.output is None:
            raise RequestError("where to write the report of several stores?", hint="--output FILE")
        output: Path = arguments.output
        write_report_of(_sources(arguments), output, now=datetime.now(UTC))
    else:
        path, configured = arguments.store, None
        if path is None:
            configuration = configuration_of(arguments)
            path, configured = configuration.store, configuration.report
        output = arguments.output or configured or path / REPORT_FILE
        write_report(CrashStore(path), output, now=datetime.now(UTC))
    print(printable(str(output)))
    return EXIT_SUCCESS


def _sources(arguments: argparse.Namespace) -> Sequence[CrashSource]:
    sources: list[CrashSource] = []
    for word in arguments.sources:
        if _URL.match(word):
            sources.append(RemoteSource(word, _options(arguments)))
        elif Path(word).is_dir():
            path = Path(word)
            sources.append(StoreSource(CrashStore(path), arguments.output, path.resolve().name))
        else:
            raise RequestError(f"there is no store {word}", hint="a directory, or SCHEME://...")
    return sources


def _options(arguments: argparse.Namespace) -> Mapping[str, Any]:
    try:
        upload = configuration_of(arguments).upload
    except DumpError:  # there need be none where nothing is collected
        return {}
    return {} if upload is None else upload.options


COMMAND = Subcommand(
    "report",
    "write pages of HTML, and a feed, about all crashes",
    _add_arguments,
    _run,
    examples=(
        "",
        "--output crashes.html",
        "--from s3://crashes --output fleet.html",
        "--from /srv/north --from /srv/south --output fleet.html",
    ),
)
