"""`qemu-crash-collector check-config`: what is wrong, and which guests there are."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from qemu_dump_ext.cli._declaration import Subcommand
from qemu_dump_ext.cli.collector._arguments import add_configuration, add_json, configuration_of
from qemu_dump_ext.connections.guest_name import find_by_name
from qemu_dump_ext.crash_collector.agent.control_socket import AgentRefusalError, ask_agent
from qemu_dump_ext.crash_collector.config.settings import Configuration
from qemu_dump_ext.crash_collector.outlets.destination import check_upload
from qemu_dump_ext.crash_collector.watch.guests import Guest, find_guests, obstacle
from qemu_dump_ext.crash_collector.watch.libvirt import domain_of
from qemu_dump_ext.crash_collector.watch.monitors import command_line_of
from qemu_dump_ext.crash_collector.watch.panic_action import panic_action
from qemu_dump_ext.crash_collector.watch.session import find_command_line
from qemu_dump_ext.errors import EXIT_FAILURE, EXIT_SUCCESS, ConnectError, DumpError
from qemu_dump_ext.printable import printable
from qemu_dump_ext.qemu.address import tcp_address, unix_path

_UNIX_SOCKETS = Path("/proc/net/unix")
_CONNECTED = "03"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    configuration = configuration_of(arguments)
    if configuration.upload is not None:
        check_upload(configuration.upload)
    problems = list(_problems(configuration))
    watched = _watched(configuration)
    guests = [_facts(guest, watched) for guest in find_guests(configuration).values()]
    status = EXIT_FAILURE if problems else EXIT_SUCCESS
    if arguments.json:
        content = {"store": str(configuration.store), "guests": guests, "problems": problems}
        print(json.dumps(content))
        return status
    found = "ok" if not problems else "the agent would not work"
    head = f"{arguments.config}: {found}; store {configuration.store}, {len(guests)} guests now"
    print(printable("\n".join((head, *problems))))
    for facts in guests:
        print(printable(f"{facts['name']}: {facts['address']}: {facts['remark']}"))
    return status


def _problems(configuration: Configuration) -> Iterator[str]:
    """Say what keeps the agent from doing what the configuration wants."""
    if (problem := _why_no_directory(configuration.store)) is not None:
        yield f"store: {problem}"
    report = configuration.report
    if report is not None and report.parent != configuration.store:
        if not report.parent.is_dir():
            yield f"report: there is no directory {report.parent}; make it (mkdir)"
        elif not os.access(report.parent, os.W_OK):
            yield f"report: {report.parent} is not writable for this user"
    control = configuration.control
    if control is not None and not control.parent.is_dir():
        yield f"control: there is no directory {control.parent}; make it (mkdir)"
    if not configuration.guests:
        yield "guests: there are none; such as: guests: [{directory: /run/vms}]"


def _why_no_directory(path: Path) -> str | None:
    """Return why there can be no directory of ours at a path, or None."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"{there} is no directory"
    if not os.statvfs(there).f_blocks:
        return f"{path} is on {there}, which keeps no files; take a directory of a disk"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{path} cannot be made or used: {there} is not writable for this user"
    return None


def _watched(configuration: Configuration) -> Collection[str]:
    """Return the addresses to which an agent that runs is connected."""
    try:
        answer = ask_agent(configuration.control_socket, {"command": "guests"})
    except (ConnectError, AgentRefusalError, ValueError):
        return ()
    return {str(guest["address"]) for guest in answer["guests"] if guest["connected"]}


def _facts(guest: Guest, watched: Collection[str]) -> dict[str, str | None]:
    command_line = _command_line_of(guest)
    action = None if command_line is None else panic_action(command_line)
    domain = None if command_line is None else domain_of(command_line)
    in_the_way = None if guest.address in watched else obstacle(guest)
    if in_the_way is None and guest.address not in watched and _is_held(guest.address):
        in_the_way = "somebody else is connected to it: give the agent a socket of its own"
    lost = _LOST if guest.target is None or guest.target.hmp is None else _LOST_BY_HMP
    remark = in_the_way or _REMARK.get(action, lost)
    if domain is not None and action != "none" and in_the_way is None:
        remark = domain.remark
    if (console := _missing_console(guest)) is not None:
        remark = f"{remark}; {console}"
    return {
        "name": guest.name,
        "address": guest.address,
        "panic_action": action,
        "libvirt_on_crash": None if domain is None else domain.on_crash,
        "obstacle": in_the_way,
        "remark": remark,
    }


def _missing_console(guest: Guest) -> str | None:
    if guest.settings.console is None:
        return None
    path = Path(guest.fill(guest.settings.console))
    if path.is_file():
        return None if os.access(path, os.R_OK) else f"its console {path} may not be read"
    return f"there is no console file {path} now"


def _is_held(address: str) -> bool:
    """Tell whether somebody is connected to a socket of this host; nobody is asked.

    QEMU serves one client, and lets others wait.
    """
    if tcp_address(address) is not None:
        return False
    path = unix_path(address)
    try:
        lines = _UNIX_SOCKETS.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return False
    # Num RefCount Protocol Flags Type St Inode Path; what was accepted has the listener's path.
    rows = (line.split(maxsplit=7) for line in lines)
    return any(row[5] == _CONNECTED and row[7] == path for row in rows if len(row) == 8)


def _command_line_of(guest: Guest) -> tuple[str, ...] | None:
    if guest.target is not None:
        return command_line_of(guest.target)
    if guest.uri is None:
        return find_command_line(guest.address)
    try:
        return tuple(find_by_name(guest.domain).words)
    except DumpError:
        return None


_REMARK = {
    None: "its QEMU is not seen on this host",
    "pause": "a panic pauses it",
    "none": "a panic is reported, and it goes on",
}
_LOST = (
    "a panic would end it before it can be dumped: start QEMU with -action panic=pause;"
    " the agent sets that when it connects"
)
_LOST_BY_HMP = (
    "a panic would end it before it can be dumped, and a human monitor cannot change that:"
    " start QEMU with -action panic=pause"
)
COMMAND = Subcommand(
    "check_config",
    "check the configuration, and show its guests",
    _add_arguments,
    _run,
    examples=("", "--config ./collector.yaml"),
    statuses="0 it is right; 1 the agent would not work with it; 2 it cannot be read, or is wrong",
)
