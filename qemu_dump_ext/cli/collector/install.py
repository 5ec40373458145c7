"""`qemu-crash-collector install`: the unit by which systemd starts the agent."""

from __future__ import annotations

import argparse
import os
import re
import sys
from importlib.resources import files
from pathlib import Path

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_configuration
from qemu_dump_ext.crash_collector.config.places import (
    SYSTEM_CONFIGURATION,
    named_configuration,
    user_configuration,
    user_directory,
)
from qemu_dump_ext.errors import EXIT_SUCCESS, DumpWriteError, RequestError
from qemu_dump_ext.printable import printable

UNIT = "qemu-crash-collector.service"
_SYSTEM_DIRECTORY = Path("/etc/systemd/system")
# Which systemd refuses to a user's services.
_OF_SYSTEM = re.compile(
    r"^(?:#.*CAP|AmbientCapabilities|# Guest memory|IOScheduling).*\n", re.MULTILINE
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    parser.set_defaults(config=None)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--system", action="store_true", help=f"for all of the host: in {_SYSTEM_DIRECTORY}"
    )
    where.add_argument(
        "--user", action="store_true", help="for guests of this user: in ~/.config/systemd/user"
    )
    where.add_argument("--print", action="store_true", help="print the unit of --system")
    parser.add_argument("--force", action="store_true", help="replace a unit that is there")


def _run(arguments: argparse.Namespace) -> int:
    usual = user_configuration() if arguments.user else SYSTEM_CONFIGURATION
    configuration: Path = (arguments.config or named_configuration() or usual).resolve()
    text = unit_text(program_path(), configuration, user=arguments.user)
    if arguments.print:
        print(text, end="")
        return EXIT_SUCCESS
    path = (user_directory() / "systemd/user" if arguments.user else _SYSTEM_DIRECTORY) / UNIT
    if path.exists() and path.read_text("utf-8", "replace") != text and not arguments.force:
        raise RequestError(f"{path} is there, and is another", hint="--force replaces it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as error:
        raise DumpWriteError(f"cannot write {path}: {error.strerror}") from error
    user = " --user" if arguments.user else ""
    print(printable(f"written: {path}"))
    if not configuration.is_file():
        print(printable(f"still to be written: {configuration}"))
    print(f"start it: systemctl{user} daemon-reload && systemctl{user} enable --now {UNIT}")
    return EXIT_SUCCESS


def program_path() -> Path:
    """Return where this program is, wherever it was installed: in a venv, by pipx, by a package.

    Raises:
        RequestError: It was not started by its name, and is not beside this Python.
    """
    for candidate in (Path(sys.argv[0]), Path(sys.executable).with_name("qemu-crash-collector")):
        path = Path(os.path.abspath(candidate))  # noqa: PTH100 - a link of pipx's stays
        if path.name == "qemu-crash-collector" and os.access(path, os.X_OK):
            return path
    raise RequestError(
        "where qemu-crash-collector is installed is not known", hint="call it by its full path"
    )


def unit_text(program: Path, configuration: Path, *, user: bool) -> str:
    """Return the unit.

    Args:
        program: What is started.
        configuration: Its configuration.
        user: Of a user's manager, which may do less.
    """
    template = files("qemu_dump_ext.crash_collector").joinpath(UNIT).read_text("utf-8")
    start = f"{_quoted(program)} run --config {_quoted(configuration)}"
    text = re.sub(r"^ExecStart=.*$", lambda _: f"ExecStart={start}", template, flags=re.MULTILINE)
    text = re.sub(r"\A(?:#.*\n)+", "", text)
    if not user:
        return text
    return _OF_SYSTEM.sub("", text).replace("multi-user.target", "default.target")


def _quoted(path: Path) -> str:
    # As systemd.service(5) has it: specifiers, variables, quotes.
    text = str(path)
    for special, doubled in (("\\", "\\\\"), ("%", "%%"), ("$", "$$"), ('"', '\\"')):
        text = text.replace(special, doubled)
    return f'"{text}"' if re.search(r"[\s\"']", text) else text


COMMAND = Subcommand(
    "install",
    "write the unit by which systemd starts the agent",
    _add_arguments,
    _run,
    examples=("--system", "--user", "--print"),
)
