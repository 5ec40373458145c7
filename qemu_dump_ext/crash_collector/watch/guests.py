"""Which guests there are: sockets by name, by pattern, and in directories."""

from __future__ import annotations

import errno
import glob
import logging
import os
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from qemu_dump_ext.connections.libvirt import DomainList
from qemu_dump_ext.connections.target import GuestTarget, find_monitor, managed_by
from qemu_dump_ext.crash_collector.config.settings import Configuration, GuestEntry, Settings
from qemu_dump_ext.crash_collector.forms import is_guest_name
from qemu_dump_ext.errors import ConnectError, DumpError, SourceError
from qemu_dump_ext.qemu.address import tcp_address, unix_path
from qemu_dump_ext.qemu.command_line import HMP
from qemu_dump_ext.qemu.socket_kind import require_kind
from qemu_dump_ext.value import Value

_QMP_THERE = "this is QMP"
_SOCKETS_MAX = 10_000
ALL_DOMAINS = "*"

_logger = logging.getLogger(__name__)


class Guest(Value):
    """A guest that is to be watched.

    Attributes:
        name: The name of its directory in the store.
        address: The address of its QMP socket: a path or HOST:PORT; of a domain of libvirt's, URI
            and name.
        settings: What holds for it.
        uri: Of libvirt's connection, where it is watched through that; else None.
        target: How it is named where `address` is no QMP socket; else None.
    """

    name: str
    address: str
    settings: Settings
    uri: str | None = None
    target: GuestTarget | None = None

    @property
    def domain(self) -> str:
        """What libvirt calls it, where it is watched through that."""
        return self.address.partition("#")[2]

    def fill(self, template: str, release: str = "") -> str:
        """Fill in the words that a template of the configuration may have."""
        words = _words_of(self.address)
        if self.uri is not None:
            words = {"stem": self.domain, "directory": self.domain}
        elif self.target is not None and self.target.hmp is None:
            words = dict.fromkeys(("stem", "directory"), self.address.partition(":")[2])
        return template.format(name=self.name, release=release, **words)


def obstacle(guest: Guest) -> str | None:
    """Return why nobody of this user can connect to a guest now, or None; nobody is asked."""
    if guest.target is not None and (reason := why_unreachable(guest.target)) is not None:
        return reason
    is_named = guest.uri is not None or (guest.target is not None and guest.target.hmp is None)
    if is_named or tcp_address(guest.address) is not None:
        return None
    path = unix_path(guest.address)
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - also of a path that is too long
    except OSError as error:
        return "there is no such socket now" if error.errno == errno.ENOENT else error.strerror
    if not stat.S_ISSOCK(mode) and not (guest.target is not None and stat.S_ISCHR(mode)):
        return "it is no socket"
    return None if os.access(path, os.W_OK) else "it is not permitted to connect to it"


class GuestFinder:
    """Looks for guests as often as it is asked; says once what is wrong with one."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._domains: dict[str, DomainList] = {}

    def close(self) -> None:
        """Give back what is held."""
        for domains in self._domains.values():
            domains.close()
        self._domains.clear()

    def find(self, configuration: Configuration) -> dict[str, Guest]:
        """Return the guests that there are now, by name.

        The first entry of the configuration that has a socket decides about it.
        """
        found: dict[str, Guest] = {}
        taken: set[str] = set()
        for entry in configuration.guests:
            for address in self._addresses(entry):
                if address in taken or Path(address) == configuration.control_socket:
                    continue
                taken.add(address)
                if entry.libvirt is not None:
                    name = address.partition("#")[2]
                elif entry.guest is not None or entry.pid is not None:
                    known = address.partition(":")[2]
                    name = entry.name.format(stem=known, directory=known)
                else:
                    name = entry.name.format(**_words_of(address))
                if not is_guest_name(name):
                    self._tell(f"{address} is not watched: {name!r} is no name for a directory")
                elif name in found:
                    self._tell(
                        f"{address} is not watched: {found[name].address} is called {name} as well"
                    )
                else:
                    found[name] = Guest(name, address, entry, entry.libvirt, _target_of(entry))
        return found

    def _addresses(self, entry: GuestEntry) -> Iterator[str]:
        if entry.libvirt is None:
            yield from _addresses(entry)
            return
        uri = entry.libvirt
        domains = self._domains.setdefault(uri, DomainList(uri))
        pattern = ALL_DOMAINS if entry.name == GuestEntry.name else entry.name
        try:
            names = domains.names(pattern)
        except SourceError as error:
            self._tell_once(f"no domain of {uri} is seen: {error}")
            return
        yield from (f"{uri}#{name}" for name in islice(names, _SOCKETS_MAX))

    def _tell(self, message: str) -> None:
        self._tell_once(f"{message} (give it another `name`)")

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            _logger.error("%s", message)


def find_guests(configuration: Configuration) -> dict[str, Guest]:
    """Return the guests that there are now, by name; nothing is held afterwards."""
    finder = GuestFinder()
    try:
        return finder.find(configuration)
    finally:
        finder.close()


def why_unreachable(target: GuestTarget) -> str | None:
    """Return why a guest cannot be watched now, or None: it can. Nobody is connected to."""
    if target.hmp is not None:
        try:
            require_kind(target.hmp, HMP)
        except ConnectError as error:
            return (
                f"{error.message}: watch it by `socket`"
                if _QMP_THERE in error.message
                else str(error)
            )
        return None
    try:
        if managed_by(target) is None:
            find_monitor(target)
    except DumpError as error:
        return str(error)
    return None


def _target_of(entry: GuestEntry) -> GuestTarget | None:
    target = GuestTarget(hmp=entry.monitor, guest=entry.guest, pid=entry.pid)
    return target if target.is_told else None


def _addresses(entry: GuestEntry) -> Iterator[str]:
    if entry.socket is not None:
        yield entry.socket
    elif entry.monitor is not None:
        yield entry.monitor
    elif entry.guest is not None:
        yield f"guest:{entry.guest}"
    elif entry.pid is not None:
        yield f"pid:{entry.pid}"
    elif entry.glob is not None:
        paths = glob.iglob(entry.glob, recursive=True)  # noqa: PTH207 - of any directory
        yield from sorted(islice(filter(_is_socket, paths), _SOCKETS_MAX))
    elif entry.directory is not None:
        paths = map(str, entry.directory.glob("*"))
        yield from sorted(islice(filter(_is_socket, paths), _SOCKETS_MAX))


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)  # noqa: PTH116 - hundreds a second
    except OSError:
        return False


def _words_of(address: str) -> dict[str, str]:
    if (target := tcp_address(address)) is not None:
        return {"stem": f"{target[0]}-{target[1]}", "directory": target[0]}
    path = Path(address)
    return {"stem": path.stem, "directory": path.parent.name}
