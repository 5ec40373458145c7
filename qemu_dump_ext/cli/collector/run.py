"""`qemu-crash-collector run`: the agent."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import resource
import sys
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_configuration, configuration_of
from qemu_dump_ext.crash_collector.agent.agent import Agent
from qemu_dump_ext.crash_collector.config.settings import Configuration, GuestEntry
from qemu_dump_ext.errors import EXIT_SUCCESS, RequestError
from qemu_dump_ext.printable import printable

# What these log is in their exceptions as well.
_TOLD_BY_EXCEPTIONS = ("paramiko", "botocore", "aiobotocore")
_FILES_MAX = 1 << 16
_FIELDS = ("guest", "cause", "crash", "signature")


class JsonFormatter(logging.Formatter):
    """One object in one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        content: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        content |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content)


class TextFormatter(logging.Formatter):
    """For people; what guests wrote is shown as it may be at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, and the lines of its exception."""
        guest = getattr(record, "guest", None)
        about = [str(getattr(record, name)) for name in _FIELDS[2:] if hasattr(record, name)]
        text = f"{guest}: " if guest else ""
        text += record.getMessage() + (f" ({', '.join(about)})" if about else "")
        text = printable(text, keep="\t")
        if record.exc_info:
            text += f"\n{printable(self.formatException(record.exc_info))}"
        return text


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    parser.add_argument(
        "--store", metavar="DIR", type=Path, help="instead of a configuration: the store"
    )
    parser.add_argument(
        "--qmp",
        metavar="SOCKET",
        action="append",
        default=[],
        help="a guest beside those of the configuration; may be repeated",
    )
    parser.add_argument(
        "--log",
        choices=("auto", "json", "text"),
        default="auto",
        help="form of the log on standard error; auto: text at a terminal",
    )


def _load(arguments: argparse.Namespace) -> Configuration:
    if arguments.store is None:
        configuration = configuration_of(arguments)
    elif arguments.qmp:
        configuration = Configuration(store=arguments.store)
    else:
        raise RequestError("which guests?", hint="--qmp SOCKET, or --config FILE")
    given = tuple(GuestEntry(socket=address) for address in arguments.qmp)
    return replace(configuration, guests=(*given, *configuration.guests))


def _run(arguments: argparse.Namespace) -> int:
    as_text = sys.stderr.isatty() if arguments.log == "auto" else arguments.log == "text"
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    for name in _TOLD_BY_EXCEPTIONS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    _raise_limit_of_files()
    agent_of = partial(Agent, _load(arguments), partial(_load, arguments))

    async def watch() -> None:
        await agent_of().run()

    asyncio.run(watch())
    return EXIT_SUCCESS


def _raise_limit_of_files() -> None:
    # Each guest has a connection; a dump and its check need dozens more.
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_MAX if most == resource.RLIM_INFINITY else min(most, _FILES_MAX)
    if now != resource.RLIM_INFINITY and now < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


COMMAND = Subcommand(
    "run",
    "watch guests until SIGTERM; SIGHUP reads the configuration again",
    _add_arguments,
    _run,
    examples=("", "--store /var/crash/guests --qmp /run/vm.qmp"),
)
